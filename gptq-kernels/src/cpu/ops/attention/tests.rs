use crate::{
    AttentionShape, Backend, KvFormat, KvShape, MatMut, MatRef, SequencePlan, StepPlan, Workspace, cpu::Cpu,
};

/// Numbers in `[-1, 1)` that look random: a linear congruential generator, Knuth's constants.
fn noise(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f32) / (1u32 << 23) as f32 - 1.0
        })
        .collect()
}

const LAYERS: usize = 2;
const POSITIONS: usize = 400;

struct Fixture {
    shape: AttentionShape,
    store: <Cpu as Backend>::KvStore,
    rope: <Cpu as Backend>::Rope,
}

impl Fixture {
    fn new(shape: AttentionShape, format: KvFormat) -> Self {
        let (kv_heads, head_dim) = (shape.kv_heads, shape.head_dim);
        let kv = KvShape { layers: LAYERS, kv_heads, head_dim, pages: 1, format };
        let half = shape.head_dim / 2;
        let angle = |i: usize| (i / half) as f64 / 10f64.powf((i % half) as f64 / half as f64);
        let cos: Vec<f32> = (0..POSITIONS * half).map(|i| angle(i).cos() as f32).collect();
        let sin: Vec<f32> = (0..POSITIONS * half).map(|i| angle(i).sin() as f32).collect();
        let mut store = Cpu.kv_store(kv).unwrap();
        Cpu.grow_kv(&mut store, 16).unwrap();
        Self { shape, store, rope: Cpu.rope(&cos, &sin, shape.head_dim).unwrap() }
    }

    /// One step of attention; `qkv` is rotated in place.
    fn step(&mut self, sequences: &[SequencePlan<'_>], qkv: &mut [f32]) -> Vec<f32> {
        let rows = sequences.iter().map(|sequence| sequence.rows.len()).sum();
        let mut step = Cpu.new_step().unwrap();
        let tokens = vec![0; rows];
        Cpu.set_step(
            &mut step,
            &StepPlan { tokens: &tokens, sequences, outputs: &[], ..StepPlan::default() },
        )
        .unwrap();
        let (shape, layer) = (self.shape, 1);
        let cols = shape.qkv_features();
        Cpu.rope_append(
            layer,
            shape,
            &step,
            &self.rope,
            MatMut::new(&mut *qkv, rows, cols).unwrap(),
            &mut self.store,
        )
        .unwrap();
        let mut y = vec![0.0; rows * shape.out_features()];
        let mut workspace = Workspace::new(&Cpu, Cpu.attention_workspace_len(&step, shape)).unwrap();
        Cpu.attention(
            layer,
            shape,
            &step,
            &self.store,
            MatRef::new(&*qkv, rows, cols).unwrap(),
            MatMut::new(y.as_mut_slice(), rows, shape.out_features()).unwrap(),
            &mut workspace,
        )
        .unwrap();
        y
    }
}

const FORMATS: [KvFormat; 2] = [KvFormat::Activations, KvFormat::Int8];

/// What is read of a head that is kept in a format.
fn kept(head: &[f32], format: KvFormat) -> Vec<f32> {
    let largest = head.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let round = |x: &f32| (x * (127.0 / largest)).round_ties_even() * (largest / 127.0);
    match format {
        KvFormat::Activations => head.to_vec(),
        KvFormat::Int8 => head.iter().map(round).collect(),
    }
}

const SHAPES: [AttentionShape; 5] = [
    AttentionShape { heads: 4, kv_heads: 2, head_dim: 64, window: None },
    AttentionShape { heads: 3, kv_heads: 3, head_dim: 20, window: None },
    AttentionShape { heads: 7, kv_heads: 1, head_dim: 32, window: Some(70) },
    AttentionShape { heads: 2, kv_heads: 1, head_dim: 80, window: Some(1) },
    AttentionShape { heads: 16, kv_heads: 2, head_dim: 128, window: None },
];

#[test]
fn equals_float64() {
    for (shape, format) in SHAPES.into_iter().flat_map(|shape| FORMATS.map(|format| (shape, format))) {
        let rows = 150;
        let mut qkv = noise(rows * shape.qkv_features(), 1);
        let y = Fixture::new(shape, format)
            .step(&[SequencePlan { rows: 0..rows, past: 0, pages: &[3, 9, 4] }], &mut qkv);
        for row in qkv.chunks_mut(shape.qkv_features()) {
            for head in row[shape.heads * shape.head_dim..].chunks_mut(shape.head_dim) {
                head.copy_from_slice(&kept(head, format));
            }
        }
        let (dim, group) = (shape.head_dim, shape.heads / shape.kv_heads);
        let at =
            |row: usize, head: usize, d: usize| f64::from(qkv[row * shape.qkv_features() + head * dim + d]);
        for row in 0..rows {
            let first = shape.window.map_or(0, |w| (row + 1).saturating_sub(w));
            for head in 0..shape.heads {
                let (key, value) = (shape.heads + head / group, shape.heads + shape.kv_heads + head / group);
                let score =
                    |j| (0..dim).map(|d| at(row, head, d) * at(j, key, d)).sum::<f64>() / (dim as f64).sqrt();
                let scores: Vec<f64> = (first..=row).map(score).collect();
                let max = scores.iter().copied().fold(f64::MIN, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
                let total: f64 = weights.iter().sum();
                // |q|, |k| <= sqrt(2 dim) after rotation, so a score of dim products errs by at most
                // (dim + 3) eps * 2 dim / sqrt(dim) and a weight relatively by twice that, plus 6 eps of exp and
                // normalisation; the weighted sum of values in [-1, 1] adds one eps for each position.
                let eps = 2f64.powi(-24);
                let score_error = (dim + 3) as f64 * eps * 2.0 * (dim as f64).sqrt();
                let bound = 2.0 * score_error + (6.0 + scores.len() as f64) * eps;
                for d in 0..dim {
                    let want =
                        weights.iter().zip(first..).map(|(w, j)| w * at(j, value, d)).sum::<f64>() / total;
                    let got = f64::from(y[(row * shape.heads + head) * dim + d]);
                    assert!((got - want).abs() <= bound, "{shape:?} row {row} head {head} {d}: {got} {want}");
                }
            }
        }
    }
}

#[test]
fn batches_and_chunks_change_no_bit() {
    for (shape, format) in SHAPES.into_iter().flat_map(|shape| FORMATS.map(|format| (shape, format))) {
        let (cols, width) = (shape.qkv_features(), shape.out_features());
        let (a, b) = (noise(200 * cols, 2), noise(77 * cols, 3));
        let alone = |qkv: &[f32], pages: &[u32]| {
            let mut qkv = qkv.to_vec();
            let rows = qkv.len() / cols;
            Fixture::new(shape, format).step(&[SequencePlan { rows: 0..rows, past: 0, pages }], &mut qkv)
        };
        let (want_a, want_b) = (alone(&a, &[0, 1, 2, 3]), alone(&b, &[5, 6]));

        // The same two sequences, side by side, in steps of uneven size; the last steps are single tokens.
        let (pages_a, pages_b) = ([7, 1, 12, 3], [0, 2]);
        let mut fixture = Fixture::new(shape, format);
        let (mut past_a, mut past_b) = (0, 0);
        for (take_a, take_b) in [(61, 1), (5, 0), (100, 70), (33, 5), (1, 1)] {
            let mut qkv = b[past_b * cols..(past_b + take_b) * cols].to_vec();
            qkv.extend_from_slice(&a[past_a * cols..(past_a + take_a) * cols]);
            let sequences = [
                SequencePlan { rows: 0..take_b, past: past_b, pages: &pages_b },
                SequencePlan { rows: take_b..take_a + take_b, past: past_a, pages: &pages_a },
            ];
            let y = fixture.step(&sequences, &mut qkv);
            let (got_b, got_a) = y.split_at(take_b * width);
            assert!(got_a == &want_a[past_a * width..(past_a + take_a) * width], "{shape:?} {past_a}");
            assert!(got_b == &want_b[past_b * width..(past_b + take_b) * width], "{shape:?} {past_b}");
            (past_a, past_b) = (past_a + take_a, past_b + take_b);
        }
        assert_eq!((past_a, past_b), (200, 77));
    }
}

#[test]
fn stale_pages_do_not_leak() {
    let shape = SHAPES[0];
    let cols = shape.qkv_features();
    for format in FORMATS {
        let mut fixture = Fixture::new(shape, format);
        let mut poison = vec![f32::NAN; 64 * cols];
        fixture.step(&[SequencePlan { rows: 0..64, past: 0, pages: &[4] }], &mut poison);
        let mut qkv = noise(3 * cols, 5);
        let y = fixture.step(&[SequencePlan { rows: 0..3, past: 0, pages: &[4] }], &mut qkv);
        assert!(y.iter().all(|v| v.is_finite()));
        // A token that is not finite is not hidden.
        let mut qkv = vec![f32::NAN; cols];
        let y = fixture.step(&[SequencePlan { rows: 0..1, past: 3, pages: &[4] }], &mut qkv);
        assert!(y.iter().all(|v| v.is_nan()));
    }
}

#[test]
fn positions_beyond_the_table_are_refused() {
    let shape = SHAPES[0];
    let mut fixture = Fixture::new(shape, KvFormat::Activations);
    let mut step = Cpu.new_step().unwrap();
    let sequences = [SequencePlan { rows: 0..1, past: POSITIONS, pages: &[0, 1, 2, 3, 4, 5, 6] }];
    Cpu.set_step(
        &mut step,
        &StepPlan { tokens: &[0], sequences: &sequences, outputs: &[], ..StepPlan::default() },
    )
    .unwrap();
    let mut qkv = vec![0.0; shape.qkv_features()];
    let qkv = MatMut::new(qkv.as_mut_slice(), 1, shape.qkv_features()).unwrap();
    let error = Cpu.rope_append(0, shape, &step, &fixture.rope, qkv, &mut fixture.store).unwrap_err();
    assert_eq!(error.to_string(), "position 400: must be below 400");
}
