//! No kernel allocates in `forward`, on whatever threads it runs.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering},
};

use gptq_format::{Bits, CodesRef, PackedLinear};
use gptq_kernels::{
    MatMut, MatRef, Workspace,
    cpu::{self, Cpu},
};

/// Counts what the whole process allocates.
struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system allocator with the same arguments; counting does not touch memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`, and `pointer` came from the system allocator.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// An act-order layer of two segments' length or more, with more blocks than threads.
fn layer() -> PackedLinear {
    let (k, n, group_size) = (256, 330, 128);
    let groups = k / group_size;
    PackedLinear::pack(&CodesRef {
        bits: Bits::B4,
        group_size,
        in_features: k,
        out_features: n,
        codes: &(0..k * n).map(|i| (i * 7 % 16) as u8).collect::<Vec<_>>(),
        zeros: &(0..groups * n).map(|i| (i % 16) as u8).collect::<Vec<_>>(),
        scales: &vec![0.01; groups * n],
        g_idx: &(0..k).map(|i| (i % groups) as u32).collect::<Vec<_>>(),
        bias: Some(&vec![0.5; n]),
    })
    .expect("codes are below 16")
}

// One test, so that no other runs at the same time and allocates.
#[test]
fn forward_allocates_nothing() {
    let weight = layer();
    let mut ran = 0;
    for kernel in cpu::kernels() {
        let layer = kernel.prepare(&weight).expect("every CPU kernel does 4 bits");
        let (k, n) = (layer.spec().in_features, layer.spec().out_features);
        for threads in [1, 3] {
            let pool =
                rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads can be had");
            for rows in [1, 20, 140] {
                let (x, mut y) = (vec![0.25; rows * k], vec![0.0; rows * n]);
                let mut workspace =
                    Workspace::new(&Cpu, layer.workspace_len(rows)).expect("memory can be had");
                // Inside the pool: from outside, rayon itself allocates a queue block every few dozen calls.
                let during = pool.install(|| {
                    let mut forward = || {
                        let x = MatRef::new(&x[..], rows, k)?;
                        layer.forward(x, MatMut::new(&mut y[..], rows, n)?, &mut workspace)
                    };
                    // Threads of this pool may still be starting, those of the last one ending, and each sets up its
                    // queues when it first steals. What `forward` itself allocates is in every round, so the least counts.
                    let rounds = (0..4).map(|_| {
                        let before = ALLOCATIONS.load(Ordering::SeqCst);
                        for _ in 0..5 {
                            forward().expect("the operands fit");
                        }
                        ALLOCATIONS.load(Ordering::SeqCst) - before
                    });
                    rounds.min().unwrap_or(usize::MAX)
                });
                assert_eq!(during, 0, "{} with {rows} rows on {threads} threads", kernel.name());
                ran += 1;
            }
        }
    }
    assert!(ran >= 12);
    // The counter counts: a boxed value is one allocation at least.
    let before = ALLOCATIONS.load(Ordering::SeqCst);
    drop(std::hint::black_box(Box::new([0u8; 100])));
    assert!(ALLOCATIONS.load(Ordering::SeqCst) > before);
}
