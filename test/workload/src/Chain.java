// SPDX-License-Identifier: Apache-2.0
//
// Chain SECONDS: Java that burns CPU behind known calls. The JVM is to be started with
// -XX:+PreserveFramePointer, without inlining of these methods
// (-XX:CompileCommand=dontinline,Chain::*), and with -XX:+DumpPerfMapAtExit for names.
// Known stacks, below Chain.turn, in the main thread and in one more:
//
//	outer > middle > inner > leafPlain
//	sorting > (the library) > order > leafSort
//	walk (15 times) > leafWalk
import java.util.Arrays;

public final class Chain {
	static volatile long sink;

	static int leafPlain(int n) {
		int x = n;
		for (int i = 0; i < n; i++) x = x * 1103515245 + 12345;
		return x;
	}

	static int leafSort(int n) {
		int x = n;
		for (int i = 0; i < n; i++) x = x * 1664525 + 1013904223;
		return x;
	}

	static int leafWalk(int n) {
		int x = n;
		for (int i = 0; i < n; i++) x = x * 22695477 + 1;
		return x;
	}

	static int inner(int n) { return leafPlain(n) + 1; }
	static int middle(int n) { return inner(n) + 1; }
	static int outer(int n) { return middle(n) + 1; }

	static int order(Integer a, Integer b) {
		sink += leafSort(300);
		return a - b;
	}

	static int sorting(int n) {
		Integer[] v = new Integer[n];
		for (int i = 0; i < n; i++) v[i] = Math.floorMod(i * 7919, 1009);
		Arrays.sort(v, Chain::order);
		return v[0];
	}

	static int walk(int level, int n) { return level == 1 ? leafWalk(n) : walk(level - 1, n) + 1; }

	static void turn() {
		sink += outer(100000);
		sink += sorting(100);
		sink += walk(15, 100000);
	}

	public static void main(String[] args) throws InterruptedException {
		System.out.println("ready");
		long end = System.nanoTime() + (long) (1e9 * Double.parseDouble(args[0]));
		Runnable turns = () -> {
			while (System.nanoTime() < end) turn();
		};
		Thread other = new Thread(turns);
		other.start();
		turns.run();
		other.join();
	}
}
