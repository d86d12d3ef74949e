//! Attention against float64, and its bits in batches and steps of all kinds.

use super::*;

const fn shape(heads: usize, kv_heads: usize, head_dim: usize, window: usize) -> AttentionShape {
    let window = if window == 0 { None } else { Some(window) };
    AttentionShape { heads, kv_heads, head_dim, window }
}

/// Every padded size with and without padding; one query head a key-value head, odd groups, more than a warp's 16; windows
/// of one token, of less than a page, of more than a chunk.
const ATTENTION: [AttentionShape; 12] = [
    shape(4, 2, 64, 0),
    shape(3, 3, 20, 0),
    shape(7, 1, 32, 70),
    shape(2, 1, 80, 1),
    shape(16, 2, 128, 0),
    shape(4, 4, 96, 300),
    shape(20, 1, 128, 0),
    shape(2, 2, 256, 0),
    shape(4, 1, 100, 0),
    shape(33, 1, 64, 65),
    shape(2, 1, 130, 0),
    shape(1, 1, 2, 0),
];

const LAYERS: usize = 2;

const FORMATS: [KvFormat; 2] = [KvFormat::Activations, KvFormat::Int8];

/// What is read of a head that is kept in a format, and the largest magnitude that it can have.
fn kept(head: &[f32], format: KvFormat) -> Vec<f64> {
    let largest = head.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let (inverse, scale) = (127.0 / largest, f64::from(largest / 127.0));
    let keep = |&x: &f32| match format {
        KvFormat::Activations => f64::from(x),
        KvFormat::Int8 => f64::from((x * inverse).round_ties_even()) * scale,
    };
    head.iter().map(keep).collect()
}

/// One layer of attention with a store and tables of its own.
struct Fixture<T: Element> {
    device: CudaDevice<T>,
    shape: AttentionShape,
    format: KvFormat,
    store: <CudaDevice<T> as Backend>::KvStore,
    rope: <CudaDevice<T> as Backend>::Rope,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl<T: Element> Fixture<T> {
    fn new(device: &CudaDevice<T>, (shape, format): (AttentionShape, KvFormat), positions: usize) -> Self {
        let (kv_heads, head_dim) = (shape.kv_heads, shape.head_dim);
        let kv = KvShape { layers: LAYERS, kv_heads, head_dim, pages: 1, format };
        let half = shape.head_dim / 2;
        let angle = |i: usize| (i / half) as f64 / 10f64.powf((i % half) as f64 / half as f64);
        let cos: Vec<f32> = (0..positions * half).map(|i| angle(i).cos() as f32).collect();
        let sin: Vec<f32> = (0..positions * half).map(|i| angle(i).sin() as f32).collect();
        let mut store = device.kv_store(kv).unwrap();
        device.grow_kv(&mut store, 3).unwrap();
        device.grow_kv(&mut store, 2 * positions.div_ceil(CudaDevice::<T>::PAGE_LEN) + 4).unwrap();
        let rope = device.rope(&cos, &sin, shape.head_dim).unwrap();
        Self { device: device.clone(), shape, format, store, rope, cos, sin }
    }

    /// One step of attention, `whole` in one call or in two.
    fn step(&mut self, sequences: &[SequencePlan<'_>], qkv: &[f32], at_once: bool) -> Vec<f32> {
        let (device, shape, layer) = (&self.device, self.shape, LAYERS - 1);
        let rows = sequences.iter().map(|sequence| sequence.rows.len()).sum();
        let mut step = device.new_step().unwrap();
        let tokens = vec![0; rows];
        device
            .set_step(
                &mut step,
                &StepPlan { tokens: &tokens, sequences, outputs: &[], ..StepPlan::default() },
            )
            .unwrap();
        let (cols, width) = (shape.qkv_features(), shape.out_features());
        let mut qkv = upload(device, qkv);
        let mut y = upload(device, &vec![f32::NAN; rows * width]);
        let mut workspace = Workspace::new(device, device.attention_workspace_len(&step, shape)).unwrap();
        let given = download(device, &qkv);
        let (x, out) = (whole_mut(&mut qkv, rows, cols), whole_mut(&mut y, rows, width));
        let (rope, store) = (&self.rope, &mut self.store);
        if at_once {
            device.attend(layer, shape, &step, rope, x, store, None, out, &mut workspace).unwrap();
            // Once more, in another order: the same bits in other places.
            let columns = shuffled(width);
            let order = device.order(&columns).unwrap();
            let (mut qkv, mut moved) =
                (upload(device, &given), upload(device, &vec![f32::NAN; rows * width]));
            let (x, out) = (whole_mut(&mut qkv, rows, cols), whole_mut(&mut moved, rows, width));
            device.attend(layer, shape, &step, rope, x, store, Some(&order), out, &mut workspace).unwrap();
            // Some tests have NaNs in them.
            let bits = |x: Vec<f32>| x.into_iter().map(f32::to_bits).collect::<Vec<_>>();
            let want = reordered(&download(device, &y), &columns);
            assert!(bits(download(device, &moved)) == bits(want), "{shape:?}");
        } else {
            device.rope_append(layer, shape, &step, rope, x, store).unwrap();
            let x = whole(&qkv, rows, cols);
            device.attention(layer, shape, &step, store, x, out, &mut workspace).unwrap();
        }
        download(device, &y)
    }

    /// Queries and keys as they are after the rotation, which is exact to the bit here, and keys and values as they are kept.
    fn rotated(&self, qkv: &[f32]) -> Vec<f64> {
        let (shape, half) = (self.shape, self.shape.head_dim / 2);
        let mut qkv = qkv.to_vec();
        for (position, row) in qkv.chunks_mut(shape.qkv_features()).enumerate() {
            for head in row[..(shape.heads + shape.kv_heads) * shape.head_dim].chunks_mut(shape.head_dim) {
                for d in 0..half {
                    let (a, b) = (head[d], head[d + half]);
                    let (cos, sin) = (self.cos[position * half + d], self.sin[position * half + d]);
                    head[d] = T::from_f32(a * cos - b * sin).to_f32();
                    head[d + half] = T::from_f32(b * cos + a * sin).to_f32();
                }
            }
        }
        let keep = |(i, head): (usize, &[f32])| match i % (shape.heads + 2 * shape.kv_heads) < shape.heads {
            true => kept(head, KvFormat::Activations),
            false => kept(head, self.format),
        };
        qkv.chunks(shape.head_dim).enumerate().flat_map(keep).collect()
    }

    /// Compares row `row` of one sequence with float64; the largest error in units of the bound.
    fn compare(&self, rotated: &[f64], row: usize, y: &[f32]) -> f64 {
        let shape = self.shape;
        let (dim, group) = (shape.head_dim, shape.heads / shape.kv_heads);
        let at = |row: usize, head: usize, d: usize| rotated[row * shape.qkv_features() + head * dim + d];
        let first = shape.window.map_or(0, |window| (row + 1).saturating_sub(window));
        let root = (dim as f64).sqrt();
        let mut worst: f64 = 0.0;
        for head in 0..shape.heads {
            let (key, value) = (shape.heads + head / group, shape.heads + shape.kv_heads + head / group);
            let terms = |j: usize| (0..dim).map(move |d| at(row, head, d) * at(j, key, d));
            let scores: Vec<f64> = (first..=row).map(|j| terms(j).sum::<f64>() / root).collect();
            let magnitude =
                (first..=row).map(|j| terms(j).map(f64::abs).sum::<f64>() / root).fold(0.0, f64::max);
            let max = scores.iter().copied().fold(f64::MIN, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
            let total: f64 = weights.iter().sum();
            let most = |j: usize| (0..dim).map(|d| at(j, value, d).abs()).fold(0.0, f64::max);
            let largest = weights.iter().zip(first..).map(|(w, j)| w * most(j)).sum::<f64>() / total;
            // A score: the tensor core adds 16 products with at most 17 errors of 2^-23 for each of dim / 16 steps, then
            // the scale rounds. A weight: twice a score's error, the rounding of the exponent's argument, at most the
            // spread of the scores, 2^-22 of the exponential, and its rounding to T. A page: a factor for it and for what
            // came before, each with those errors of the exponential, and two roundings, for every page and chunk after
            // it. The products with the values: four steps.
            let pages = (scores.len() / 64 + 2) as f64;
            //
            // Of bytes, a score's factor is itself rounded. A weight is multiplied with its value's scale and rounded to fp16
            // in units of a power of two below the largest of the page: by half a unit in the last place, which is at least
            // 2^-24. So a value of m at most moves a sum over a page by 64 * 2^-25 times the largest weight times m.
            let in_bytes = self.format == KvFormat::Int8;
            let score_error = (34.0 * (dim as f64 / 16.0).ceil() + 3.0) * EPS * magnitude;
            let exponential = 4.0 * EPS + 4.0 * magnitude * EPS;
            let weight_error =
                2.0 * score_error + exponential + if in_bytes { f16::UNIT + EPS } else { T::UNIT };
            let relative = 2.0 * weight_error + 2.0 * pages * (exponential + 2.0 * EPS) + 4.0 * 34.0 * EPS;
            for d in 0..dim {
                let sum = |f: fn(f64) -> f64| {
                    weights.iter().zip(first..).map(|(w, j)| w * f(at(j, value, d))).sum::<f64>() / total
                };
                let (want, mass) = (sum(|v| v), sum(f64::abs));
                let lost = if in_bytes { 64.0 / (1u64 << 25) as f64 * largest } else { 0.0 };
                let bound = relative * mass + lost + T::UNIT * want.abs() + T::SUBNORMAL;
                let error = (f64::from(y[head * dim + d]) - want).abs() / bound;
                assert!(
                    error <= 1.0,
                    "{shape:?} row {row} head {head} feature {d}: {} {want}",
                    y[head * dim + d]
                );
                worst = worst.max(error);
            }
        }
        worst
    }
}

/// All shapes in all formats.
fn attention() -> impl Iterator<Item = (AttentionShape, KvFormat)> {
    FORMATS.into_iter().flat_map(|format| ATTENTION.map(|shape| (shape, format)))
}

fn attention_equals_float64<T: Element>(device: &CudaDevice<T>) {
    for (shape, format) in attention() {
        let rows = 331;
        let mut fixture = Fixture::<T>::new(device, (shape, format), 400);
        let qkv = noise::<T>(rows * shape.qkv_features(), 1);
        let pages = [3, 9, 4, 1, 0, 6];
        let y = fixture.step(&[SequencePlan { rows: 0..rows, past: 0, pages: &pages }], &qkv, true);
        let rotated = fixture.rotated(&qkv);
        let width = shape.out_features();
        let worst = (0..rows)
            .filter(|row| row % 7 == 0 || row % 64 > 61 || row % 64 < 2)
            .map(|row| fixture.compare(&rotated, row, &y[row * width..][..width]))
            .fold(0.0, f64::max);
        println!("{} | {shape:?} {format:?} | worst error {worst:.3} of the bound", T::NAME);
    }
}

/// Long contexts, in prefill and in decoding.
fn long_attention<T: Element>(device: &CudaDevice<T>) {
    let shapes = [shape(8, 2, 128, 0), shape(2, 2, 64, 5000)];
    for (shape, format) in FORMATS.into_iter().flat_map(|format| shapes.map(|shape| (shape, format))) {
        let rows = 8192;
        let mut fixture = Fixture::<T>::new(device, (shape, format), rows);
        let (cols, width) = (shape.qkv_features(), shape.out_features());
        let qkv = noise::<T>(rows * cols, 1);
        let pages: Vec<u32> = (0..128).map(|page| (page * 77 + 5) % 128).collect();
        let mut y = Vec::new();
        // 8190 tokens in four steps, then two alone.
        for (start, end) in [(0, 2048), (2048, 4100), (4100, 6001), (6001, 8190), (8190, 8191), (8191, 8192)]
        {
            let plan = SequencePlan { rows: 0..end - start, past: start, pages: &pages };
            y.extend(fixture.step(&[plan], &qkv[start * cols..end * cols], true));
        }
        let rotated = fixture.rotated(&qkv);
        for row in [100, 2047, 2048, 5555, 8189, 8190, 8191] {
            let worst = fixture.compare(&rotated, row, &y[row * width..][..width]);
            println!("{} | {shape:?} {format:?} | row {row}: {worst:.3} of the bound", T::NAME);
        }
    }
}

/// The same sequence alone in one step; in uneven steps beside another; one row at a time; by one call or by two.
fn batches_and_steps_change_no_bit<T: Element>(device: &CudaDevice<T>) {
    for (shape, format) in attention() {
        let (cols, width) = (shape.qkv_features(), shape.out_features());
        let (len_a, len_b) = (601, 278);
        let (a, b) = (noise::<T>(len_a * cols, 2), noise::<T>(len_b * cols, 3));
        let alone = |qkv: &[f32], pages: &[u32], at_once| {
            let rows = qkv.len() / cols;
            let plan = SequencePlan { rows: 0..rows, past: 0, pages };
            Fixture::<T>::new(device, (shape, format), 640).step(&[plan], qkv, at_once)
        };
        let want_a = alone(&a, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], true);
        let want_b = alone(&b, &[5, 6, 8, 1, 2], true);
        assert_eq!(want_a, alone(&a, &[9, 8, 7, 6, 5, 4, 3, 2, 1, 0], false), "{shape:?} {format:?}");

        let (pages_a, pages_b) = ([7, 1, 12, 3, 0, 15, 9, 11, 10, 2], [4, 5, 6, 8, 13]);
        let mut fixture = Fixture::<T>::new(device, (shape, format), 640);
        let (mut past_a, mut past_b) = (0, 0);
        let mut steps = vec![
            (61, 1, true),
            (1, 62, true),
            (1, 1, true),
            (1, 1, true),
            (1, 1, false),
            (130, 1, true),
            (55, 187, false),
        ];
        steps.extend((0..24).map(|i| (1, 1, i % 5 != 0)));
        steps.push((307, 0, true));
        steps.extend((0..20).map(|_| (1, 0, true)));
        for (take_a, take_b, at_once) in steps {
            let mut qkv = b[past_b * cols..(past_b + take_b) * cols].to_vec();
            qkv.extend_from_slice(&a[past_a * cols..(past_a + take_a) * cols]);
            let second = SequencePlan { rows: take_b..take_a + take_b, past: past_a, pages: &pages_a };
            let sequences = match take_b {
                0 => vec![second],
                _ => vec![SequencePlan { rows: 0..take_b, past: past_b, pages: &pages_b }, second],
            };
            let y = fixture.step(&sequences, &qkv, at_once);
            let (got_b, got_a) = y.split_at(take_b * width);
            assert!(
                got_a == &want_a[past_a * width..(past_a + take_a) * width],
                "{shape:?} {format:?} a at {past_a}"
            );
            assert!(
                got_b == &want_b[past_b * width..(past_b + take_b) * width],
                "{shape:?} {format:?} b at {past_b}"
            );
            (past_a, past_b) = (past_a + take_a, past_b + take_b);
        }
        assert_eq!((past_a, past_b), (len_a, len_b));
    }
}

fn stale_pages_do_not_leak<T: Element>(device: &CudaDevice<T>) {
    for (shape, format) in attention() {
        let cols = shape.qkv_features();
        let mut fixture = Fixture::<T>::new(device, (shape, format), 400);
        let poison = vec![f32::NAN; 64 * cols];
        fixture.step(&[SequencePlan { rows: 0..64, past: 0, pages: &[4] }], &poison, true);
        let qkv = noise::<T>(5 * cols, 5);
        let y = fixture.step(&[SequencePlan { rows: 0..3, past: 0, pages: &[4] }], &qkv[..3 * cols], true);
        assert!(y.iter().all(|v| v.is_finite()), "{shape:?} {format:?}");
        for past in [3, 4] {
            let qkv = &qkv[past * cols..][..cols];
            let y = fixture.step(&[SequencePlan { rows: 0..1, past, pages: &[4] }], qkv, true);
            assert!(y.iter().all(|v| v.is_finite()), "{shape:?} {format:?}");
        }
        // A token that is not finite is not hidden, alone or with others.
        let nan = vec![f32::NAN; 2 * cols];
        for (past, rows) in [(5, 1), (5, 2)] {
            let y =
                fixture.step(&[SequencePlan { rows: 0..rows, past, pages: &[4] }], &nan[..rows * cols], true);
            assert!(y.iter().all(|v| v.is_nan()), "{shape:?} {format:?}");
        }
    }
}

#[test]
fn attention_equals_float64_in_fp16() {
    for device in both::<f16>() {
        attention_equals_float64(&device);
        long_attention(&device);
    }
}

#[test]
fn attention_equals_float64_in_bf16() {
    for device in both::<bf16>() {
        attention_equals_float64(&device);
        long_attention(&device);
    }
}

#[test]
fn batches_and_steps_change_no_bit_in_fp16() {
    both::<f16>().iter().for_each(batches_and_steps_change_no_bit);
}

#[test]
fn batches_and_steps_change_no_bit_in_bf16() {
    both::<bf16>().iter().for_each(batches_and_steps_change_no_bit);
}

#[test]
fn stale_pages_do_not_leak_into_sequences() {
    both::<f16>().iter().for_each(stale_pages_do_not_leak);
    both::<bf16>().iter().for_each(stale_pages_do_not_leak);
}

#[test]
fn what_does_not_fit_is_refused() {
    let Some(device) = gpu::<f16>() else { return };
    let kv = |head_dim, format| KvShape { layers: 1, kv_heads: 2, head_dim, pages: 1, format };
    for format in FORMATS {
        assert!(matches!(
            device.kv_store(kv(258, format)),
            Err(KernelError::Argument { what: "head_dim", got: 258, limit: 257 })
        ));
    }
    let shape = shape(4, 2, 64, 0);
    let mut fixture = Fixture::<f16>::new(&device, (shape, KvFormat::Int8), 100);
    let mut refuse = |past: usize, pages: &[u32], layer: usize| {
        let mut step = device.new_step().unwrap();
        let sequences = [SequencePlan { rows: 0..1, past, pages }];
        device
            .set_step(
                &mut step,
                &StepPlan { tokens: &[0], sequences: &sequences, outputs: &[], ..StepPlan::default() },
            )
            .unwrap();
        let mut qkv = device.alloc(shape.qkv_features()).unwrap();
        let mut y = device.alloc(shape.out_features()).unwrap();
        let (x, y) =
            (whole_mut(&mut qkv, 1, shape.qkv_features()), whole_mut(&mut y, 1, shape.out_features()));
        let mut workspace = Workspace::new(&device, device.attention_workspace_len(&step, shape)).unwrap();
        let result =
            device.attend(layer, shape, &step, &fixture.rope, x, &mut fixture.store, None, y, &mut workspace);
        result.unwrap_err().to_string()
    };
    assert_eq!(refuse(100, &[0, 1], 0), "position 100: must be below 100");
    assert_eq!(refuse(0, &[1000], 0), "page 1000: must be below 8");
    assert_eq!(refuse(0, &[0], 2), "layer 2: must be below 2");
}
