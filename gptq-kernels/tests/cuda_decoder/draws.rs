use gptq_kernels::{
    Backend, Draw, SequencePlan, StepPlan,
    cuda::{CudaDevice, Element},
};
use half::{bf16, f16};

use super::{both, noise, upload, whole};

/// Draws of every kind from logits of every kind: the tokens are those of the law, as the host follows it.
fn draws_follow_the_law<T: Element>(device: &CudaDevice<T>) {
    let mut state = 1u64;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state ^ state >> 29
    };
    for cols in [1, 7, 1000, 32_000, 128_256] {
        // Many equal ones; a few far above the others; all kinds of numbers; the same everywhere.
        let spreads = [(0.25, 12.0), (0.001, 3.0), (1e-4, 20.0), (1.0, 0.0)];
        let draws: Vec<Draw> = (0..48)
            .map(|i| Draw {
                temperature: [0.0, 1.0, 0.3, 2.5, 1e-3, 0.7][i % 6],
                top_k: [0, 1, 5, 50, 400, cols as u32][i / 2 % 6],
                top_p: [1.0, 0.9, 0.5, 0.999, 1e-6][i / 3 % 5],
                min_p: [0.0, 0.05, 1.0][i / 5 % 3],
                random: random(),
            })
            .collect();
        let rows = draws.len();
        let mut x = vec![0.0; rows * cols];
        for (r, row) in x.chunks_mut(cols).enumerate() {
            let (grain, spread) = spreads[r % spreads.len()];
            for (v, noise) in row.iter_mut().zip(noise::<T>(cols, r as u64)) {
                *v = T::from_f32((noise.powi(3) * spread / grain).round() * grain).to_f32();
            }
        }
        x[cols / 2] = f32::NAN;
        x[cols..2 * cols].fill(f32::NEG_INFINITY);
        x[3 * cols - 1] = f32::INFINITY;
        x[3 * cols] = -0.0;
        let (tokens, outputs): (Vec<u32>, Vec<u32>) =
            ((0..rows as u32).collect(), (0..rows as u32).collect());
        let sequences = [SequencePlan { rows: 0..rows, past: 0, pages: &[0] }];
        let mut step = device.new_step().unwrap();
        let plan =
            StepPlan { tokens: &tokens, sequences: &sequences, outputs: &outputs, drawn: &[], draws: &draws };
        // The law itself, and the kernel for greedy draws.
        let greedy = vec![Draw::GREEDY; rows];
        for draws in [&draws, &greedy] {
            device.set_step(&mut step, &StepPlan { draws, ..plan }).unwrap();
            let buffer = upload(device, &x);
            device.draw(&step, whole(&buffer, rows, cols)).unwrap();
            let number = device.send_drawn(&mut step).unwrap();
            let got = device.drawn(&mut step, number).unwrap();
            for (r, (draw, &got)) in draws.iter().zip(&got).enumerate() {
                assert_eq!(got, draw.token(&x[r * cols..][..cols]), "{cols}, row {r}: {draw:?}");
            }
        }
        assert!(device.drawn(&mut step, 0).is_err() && device.drawn(&mut step, 7).is_err());
    }
}

#[test]
fn draws_follow_the_law_in_fp16() {
    both::<f16>().iter().for_each(draws_follow_the_law);
}

#[test]
fn draws_follow_the_law_in_bf16() {
    both::<bf16>().iter().for_each(draws_follow_the_law);
}
