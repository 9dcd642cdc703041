/* SPDX-License-Identifier: Apache-2.0
 *
 * signals SECONDS: what C programs do to their stacks: signal handlers, on the stack they
 * interrupted and on one of their own, longjmp, tail calls, assembly with CFI, calls into
 * the vDSO, threads, vfork. It builds with musl too. Known stacks, below main > turn:
 *
 *	interrupted_a > interrupted_b > (signal frame) > on_signal > handled > leaf_signal
 *	interrupted_a > interrupted_b > (signal frame) > on_altstack > handled_alt > leaf_altstack
 *	raiser > ... > on_raise > leaf_raised        (from a system call)
 *	faulting > (signal frame) > on_fault > leaf_fault (from a fault; steps over it)
 *	jumper > jumped_a > jumped_b > leaf_jump     (and longjmp back)
 *	tail_a > leaf_tail                           (tail_b has jumped away)
 *	asm_push > asm_frame > asm_align > leaf_asm
 *	clocked > clock_gettime > vDSO
 *	forker > vfork child > leaf_vfork
 *
 * and in threads worker > thread_a > thread_b > leaf_thread.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#define NOIPA __attribute__((noipa))

static volatile uint64_t sink;
static volatile int running = 1;

static inline __attribute__((always_inline)) uint64_t spin(uint64_t turns, uint64_t factor)
{
	uint64_t x = turns;

	for (uint64_t i = 0; i < turns; i++)
		x = x * factor + 1;
	sink = x;
	return x;
}

/* One leaf a form, so that a sample's innermost function names its form. */
#define LEAF(name, factor)                                                     \
	NOIPA uint64_t name(uint64_t turns)                                    \
	{                                                                      \
		return spin(turns, factor);                                    \
	}
LEAF(leaf_signal, 6364136223846793005)
LEAF(leaf_altstack, 2862933555777941757)
LEAF(leaf_raised, 3935559000370003845)
LEAF(leaf_fault, 4768777513237032717)
LEAF(leaf_jump, 1181783497276652981)
LEAF(leaf_tail, 2685821657736338717)
LEAF(leaf_asm, 1865811235122147685)
LEAF(leaf_vfork, 1442695040888963407)
LEAF(leaf_thread, 3202034522624059733)

/* A timer interrupts interrupted_b wherever it is. */
static volatile sig_atomic_t alarms;

NOIPA static uint64_t handled(uint64_t n) { return leaf_signal(n) + 1; }
NOIPA static uint64_t handled_alt(uint64_t n) { return leaf_altstack(n) + 1; }

NOIPA static void on_signal(int signal, siginfo_t *info, void *context)
{
	(void)info, (void)context;
	sink = handled(200000) + (uint64_t)signal;
	alarms++;
}

NOIPA static void on_altstack(int signal, siginfo_t *info, void *context)
{
	(void)info, (void)context;
	sink = handled_alt(200000) + (uint64_t)signal;
	alarms++;
}

NOIPA static uint64_t interrupted_b(uint64_t n)
{
	sig_atomic_t until = alarms + 3;

	while (alarms < until)
		spin(100, 7664345821815920749);
	return n;
}
NOIPA static uint64_t interrupted_a(uint64_t n) { return interrupted_b(n) + 1; }

static void handle(int signal, void (*handler)(int, siginfo_t *, void *), int flags)
{
	struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | flags};

	sigaction(signal, &action, NULL);
}

NOIPA static void interrupted(void (*handler)(int, siginfo_t *, void *), int flags)
{
	struct itimerval every = {{0, 2000}, {0, 2000}}, never = {{0, 0}, {0, 0}};

	handle(SIGALRM, handler, SA_RESTART | flags);
	setitimer(ITIMER_REAL, &every, NULL);
	sink = interrupted_a(1);
	setitimer(ITIMER_REAL, &never, NULL);
}

/* From a system call: the frame below the handler is libc's. */
NOIPA static void on_raise(int signal, siginfo_t *info, void *context)
{
	(void)info, (void)context;
	sink = leaf_raised(100000) + (uint64_t)signal;
}
NOIPA static uint64_t raiser(void) { return (uint64_t)raise(SIGUSR1) + 1; }

/* From a fault: the faulting instruction is exact, and not behind a call. */
#if defined(__x86_64__)
#define FAULT ".byte 0x0f, 0x0b" /* ud2 */
#define FAULT_SIZE 2
#define CONTEXT_IP(c) ((c)->uc_mcontext.gregs[REG_RIP])
#elif defined(__aarch64__)
#define FAULT "udf #0"
#define FAULT_SIZE 4
#define CONTEXT_IP(c) ((c)->uc_mcontext.pc)
#endif
NOIPA static void on_fault(int signal, siginfo_t *info, void *context)
{
	(void)info;
	sink = leaf_fault(100000) + (uint64_t)signal;
	CONTEXT_IP((ucontext_t *)context) += FAULT_SIZE;
}
/* The fault is the first instruction: an address before it is in another function. */
NOIPA void faulting(void);
__asm__(".text\n"
	".type faulting, %function\n"
	"faulting:\n"
	".cfi_startproc\n"
	FAULT "\n"
	"ret\n"
	".cfi_endproc\n"
	".size faulting, .-faulting\n");
NOIPA static uint64_t faulter(void)
{
	faulting();
	return sink;
}

static jmp_buf back;
NOIPA static uint64_t jumped_b(uint64_t n)
{
	sink = leaf_jump(n);
	longjmp(back, 1);
}
NOIPA static uint64_t jumped_a(uint64_t n) { return jumped_b(n) + 1; }
NOIPA static uint64_t jumper(uint64_t n)
{
	if (setjmp(back) == 0)
		return jumped_a(n) + 1;
	return leaf_jump(n) + 2; /* the registers have come back */
}

NOIPA static uint64_t tail_b(uint64_t n) { return leaf_tail(n); }
NOIPA static uint64_t tail_a(uint64_t n) { return tail_b(n) + 1; }

/* Assembly that does to its frame what compilers do not. */
#if defined(__x86_64__)
uint64_t asm_push(uint64_t n);
__asm__(".text\n"
	/* Pushes and pops around calls, without a frame pointer. */
	".globl asm_push\n"
	".type asm_push, @function\n"
	"asm_push:\n"
	".cfi_startproc\n"
	"push %rdi\n"
	".cfi_adjust_cfa_offset 8\n"
	"push %rdi\n"
	".cfi_adjust_cfa_offset 8\n"
	"push %rdi\n"
	".cfi_adjust_cfa_offset 8\n"
	"call asm_frame\n"
	"pop %rdi\n"
	".cfi_adjust_cfa_offset -8\n"
	"call asm_frame\n" /* the stack is not aligned here */
	"add $16, %rsp\n"
	".cfi_adjust_cfa_offset -16\n"
	"ret\n"
	".cfi_endproc\n"
	".size asm_push, .-asm_push\n"
	/* Its CFA is by rbx. */
	".type asm_frame, @function\n"
	"asm_frame:\n"
	".cfi_startproc\n"
	"push %rbx\n"
	".cfi_adjust_cfa_offset 8\n"
	".cfi_rel_offset %rbx, 0\n"
	"mov %rsp, %rbx\n"
	".cfi_def_cfa_register %rbx\n"
	"sub $200, %rsp\n"
	"and $-64, %rsp\n"
	"call asm_saved\n"
	"mov %rbx, %rsp\n"
	".cfi_def_cfa_register %rsp\n"
	"pop %rbx\n"
	".cfi_adjust_cfa_offset -8\n"
	".cfi_restore %rbx\n"
	"ret\n"
	".cfi_endproc\n"
	".size asm_frame, .-asm_frame\n"
	/* The old stack pointer lies on the new stack: CFA = *(rsp + 8) + 8, as in OpenSSL. */
	".type asm_saved, @function\n"
	"asm_saved:\n"
	".cfi_startproc\n"
	"mov %rsp, %rax\n"
	".cfi_def_cfa_register %rax\n"
	"sub $512, %rsp\n"
	"and $-64, %rsp\n"
	"mov %rax, 8(%rsp)\n"
	".cfi_escape 0x0f, 0x05, 0x77, 0x08, 0x06, 0x23, 0x08\n"
	"call leaf_asm\n"
	"mov 8(%rsp), %rsi\n"
	".cfi_def_cfa %rsi, 8\n"
	"mov %rsi, %rsp\n"
	".cfi_def_cfa_register %rsp\n"
	"ret\n"
	".cfi_endproc\n"
	".size asm_saved, .-asm_saved\n");
#else
NOIPA static uint64_t asm_saved(uint64_t n) { return leaf_asm(n) + 1; }
NOIPA static uint64_t asm_frame(uint64_t n) { return asm_saved(n) + 1; }
NOIPA static uint64_t asm_push(uint64_t n) { return asm_frame(n) + 1; }
#endif

NOIPA static uint64_t clocked(int n)
{
	struct timespec t;
	uint64_t total = 0;

	for (int i = 0; i < n; i++) {
		clock_gettime(CLOCK_MONOTONIC, &t);
		total += (uint64_t)t.tv_nsec;
	}
	return total;
}

/* The child runs on its parent's stack, in its parent's memory. */
NOIPA static uint64_t forker(uint64_t n)
{
	pid_t child = vfork();

	if (child == 0) {
		sink = leaf_vfork(n);
		_exit(0);
	}
	if (child > 0)
		waitpid(child, NULL, 0);
	return sink;
}

NOIPA static uint64_t thread_b(uint64_t n) { return leaf_thread(n) + 1; }
NOIPA static uint64_t thread_a(uint64_t n) { return thread_b(n) + 1; }
NOIPA static void *worker(void *arg)
{
	for (int i = 0; i < 20; i++)
		sink = thread_a(20000);
	return arg;
}

NOIPA static void turn(void)
{
	pthread_t thread;

	/* Signals are for the main thread: the others are gone by then. */
	if (pthread_create(&thread, NULL, worker, NULL) == 0)
		pthread_join(thread, NULL);
	interrupted(on_signal, 0);
	interrupted(on_altstack, SA_ONSTACK);
	for (int i = 0; i < 5; i++) {
		sink = raiser();
		sink = faulter();
		sink = jumper(50000);
		sink = tail_a(100000);
		sink = asm_push(30000);
	}
	sink = clocked(5000);
	sink = forker(300000);
}

int main(int argc, char **argv)
{
	size_t size = 64 * 1024;
	stack_t other = {.ss_size = size};

	if (argc != 2) {
		fprintf(stderr, "usage: signals SECONDS\n");
		return 2;
	}
	other.ss_sp = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	sigaltstack(&other, NULL);
	handle(SIGUSR1, on_raise, 0);
	handle(SIGILL, on_fault, 0);
	puts("ready");
	fflush(stdout);
	for (time_t end = time(NULL) + atoi(argv[1]); time(NULL) < end;)
		turn();
	return 0;
}
