// SPDX-License-Identifier: Apache-2.0
//
// levels SECONDS: Rust that burns CPU behind dynamic dispatch, closures, sorting and
// formatting. Built with unwinding panics (caught here, too) and with panic=abort. Known
// stacks, below levels::main > levels::turn:
//
//	levels::outer > <levels::Middle as levels::Visit>::visit > levels::inner > levels::leaf_dyn
//	levels::sorted > ... > levels::order > levels::leaf_sort
//	levels::caught > ... > levels::panics > ... > <levels::Guard as Drop>::drop > levels::leaf_drop

use std::time::{Duration, Instant};

// As std::hint::black_box, which Debian 12's rustc does not have yet.
#[inline(always)]
fn black_box<T>(x: T) -> T {
    let seen = unsafe { std::ptr::read_volatile(&x) };
    std::mem::forget(x);
    seen
}

macro_rules! leaf {
    ($name:ident, $factor:expr) => {
        #[inline(never)]
        fn $name(turns: u64) -> u64 {
            let mut x = turns;
            for _ in 0..turns {
                x = black_box(x.wrapping_mul($factor).wrapping_add(1));
            }
            x
        }
    };
}
leaf!(leaf_dyn, 6364136223846793005);
leaf!(leaf_sort, 2862933555777941757);
leaf!(leaf_drop, 3935559000370003845);

trait Visit {
    fn visit(&self, n: u64) -> u64;
}
struct Middle(u64);
impl Visit for Middle {
    #[inline(never)]
    fn visit(&self, n: u64) -> u64 {
        inner(n + self.0) + 1
    }
}

#[inline(never)]
fn inner(n: u64) -> u64 {
    let text = format!("{} {:?}", n, [n; 3]);
    leaf_dyn(30_000) + black_box(text).len() as u64
}

#[inline(never)]
fn outer(visitor: &dyn Visit, n: u64) -> u64 {
    visitor.visit(n) + 1
}

#[inline(never)]
fn order(a: &u64, b: &u64) -> std::cmp::Ordering {
    black_box(leaf_sort(40));
    a.cmp(b)
}

#[inline(never)]
fn sorted(mut seed: u64) -> u64 {
    let mut v = vec![0u64; 300];
    for x in v.iter_mut() {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1);
        *x = seed >> 20;
    }
    v.sort_by(order);
    v[0] + 1
}

struct Guard(u64);
impl Drop for Guard {
    #[inline(never)]
    fn drop(&mut self) {
        black_box(leaf_drop(self.0));
    }
}

#[inline(never)]
fn panics(n: u64) -> u64 {
    let _guard = Guard(n);
    if black_box(true) {
        std::panic::resume_unwind(Box::new(1)); // a panic without its message
    }
    n
}

#[inline(never)]
fn caught(n: u64) -> u64 {
    match std::panic::catch_unwind(|| panics(n)) {
        Ok(n) => n,
        Err(_) => n + 1,
    }
}

#[inline(never)]
fn turn(n: u64) -> u64 {
    let mut total = outer(black_box(&Middle(1)), n) + sorted(n);
    if cfg!(panic = "unwind") {
        total += caught(30_000);
    } else {
        drop(black_box(Guard(30_000)));
    }
    total
}

fn main() {
    let seconds = std::env::args().nth(1).and_then(|a| a.parse().ok()).unwrap_or_else(|| {
        eprintln!("usage: levels SECONDS");
        std::process::exit(2)
    });
    println!("ready");
    let end = Instant::now() + Duration::from_secs_f64(seconds);
    let mut n = 7919u64;
    while Instant::now() < end {
        n = black_box(turn(n % 1000));
    }
}
