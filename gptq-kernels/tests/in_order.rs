//! Layers that take `x` in their own order, and operations that write it that way, on the CPU.

// clippy.toml allows it in tests, but not in the functions that tests share.
#![allow(clippy::unwrap_used)]

use gptq_format::{Bits, CodesRef, PackedLinear};
use gptq_kernels::{
    AttentionShape, Backend, Epilogue, Fusion, KernelError, KvFormat, KvShape, Linear, LinearSpec, MatMut,
    MatRef, RmsNorm, SequencePlan, StepPlan, WeightFormat, Workspace,
    cpu::{self, Cpu},
    reference::Reference,
};
use proptest::prelude::*;

/// Numbers in `[-1, 1)` that look random.
fn noise(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
        })
        .collect()
}

/// `0..len` in an order that looks random.
fn shuffled(len: usize, seed: u64) -> Vec<u32> {
    let keys = noise(len, seed);
    let mut order: Vec<u32> = (0..len as u32).collect();
    order.sort_by(|&a, &b| keys[a as usize].total_cmp(&keys[b as usize]));
    order
}

/// Columns `order[0], order[1], ..` of a matrix.
fn reordered(x: &[f32], order: &[u32]) -> Vec<f32> {
    let rows = x.chunks_exact(order.len());
    rows.flat_map(|row| order.iter().map(|&column| row[column as usize])).collect()
}

/// A layer whose groups have `group_size` features each, anywhere.
fn layer(bits: Bits, (inputs, outputs): (usize, usize), group_size: usize, seed: u64) -> PackedLinear {
    let groups = inputs.div_ceil(group_size);
    let code = |x: f32| ((x + 1.0) * 0.5 * f32::from(bits.max_code())) as u8;
    let mut g_idx = vec![0; inputs];
    for (place, feature) in shuffled(inputs, seed).into_iter().enumerate() {
        g_idx[feature as usize] = (place / group_size) as u32;
    }
    PackedLinear::pack(&CodesRef {
        bits,
        group_size,
        in_features: inputs,
        out_features: outputs,
        codes: &noise(inputs * outputs, seed + 1).into_iter().map(code).collect::<Vec<_>>(),
        zeros: &noise(groups * outputs, seed + 2).into_iter().map(code).collect::<Vec<_>>(),
        scales: &noise(groups * outputs, seed + 3).into_iter().map(|x| 0.02 + x * 0.01).collect::<Vec<_>>(),
        g_idx: &g_idx,
        bias: Some(&noise(outputs, seed + 4)),
    })
    .unwrap()
}

fn forward(layer: &dyn Linear<Cpu>, x: &[f32], y: &mut [f32]) {
    let (inputs, outputs) = (layer.spec().in_features, layer.spec().y_features());
    let rows = x.len() / inputs;
    let mut workspace = Workspace::new(&Cpu, layer.workspace_len(rows)).unwrap();
    let (x, y) = (MatRef::new(x, rows, inputs).unwrap(), MatMut::new(y, rows, outputs).unwrap());
    layer.forward(x, y, &mut workspace).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_layer_in_order_is_the_layer(
        bits in (0..4usize).prop_map(|i| [Bits::B2, Bits::B3, Bits::B4, Bits::B8][i]),
        inputs in 33..300usize,
        outputs in 1..90usize,
        group_size in 1..4usize,
        rows in 1..20usize,
        seed in any::<u64>(),
    ) {
        let packed = layer(bits, (inputs, outputs), 32 * group_size, seed);
        let x = noise(rows * inputs, seed ^ 5);
        let reference = Reference::new(&packed);
        for kernel in cpu::kernels() {
            let spec = LinearSpec::of_in_order(&packed);
            let plain = matches!(spec.weight, WeightFormat::Gptq { act_order: false, .. });
            prop_assert!(plain);
            let in_order = kernel.prepare_in_order(&packed, &Fusion::default()).unwrap();
            prop_assert_eq!((in_order.spec(), in_order.kernel()), (&spec, kernel.name()));
            let moved = match in_order.input_order() {
                Some(order) => reordered(&x, order),
                None => x.clone(),
            };
            prop_assert_eq!(in_order.input_order().is_some(), packed.is_act_order());
            let mut y = vec![f32::NAN; rows * outputs];
            forward(in_order.as_ref(), &moved, &mut y);
            let bound = kernel.error_bound(&spec);
            for (i, &got) in y.iter().enumerate() {
                let exact = reference.element(&x[i / outputs * inputs..][..inputs], i % outputs);
                let most = bound.of(exact.magnitude, exact.y, exact.weight_sum);
                prop_assert!((f64::from(got) - exact.y).abs() <= most, "{}: {got} {exact:?}", kernel.name());
            }
        }
    }

    #[test]
    fn operations_write_in_order(rows in 1..5usize, cols in 1..200usize, seed in any::<u64>()) {
        let (x, delta, weight) = (noise(rows * cols, seed), noise(rows * cols, !seed), noise(cols, seed ^ 1));
        let columns = shuffled(cols, seed ^ 2);
        let (order, moved) = (Cpu.order(&columns).unwrap(), reordered(&weight, &columns));
        let read = |x| MatRef::<Cpu>::new(x, rows, cols).unwrap();
        let norm = |weight: &[f32], order| {
            let mut y = vec![f32::NAN; rows * cols];
            Cpu.rms_norm(read(&x), weight, 1e-5, order, MatMut::new(&mut y[..], rows, cols).unwrap()).unwrap();
            y
        };
        prop_assert_eq!(norm(&moved, Some(&order)), reordered(&norm(&weight, None), &columns));
        let add_norm = |weight: &[f32], order| {
            let (mut residual, mut y) = (x.clone(), vec![f32::NAN; rows * cols]);
            let into = MatMut::new(&mut residual[..], rows, cols).unwrap();
            let y_into = MatMut::new(&mut y[..], rows, cols).unwrap();
            Cpu.add_rms_norm(into, read(&delta), weight, 1e-5, order, y_into).unwrap();
            (residual, y)
        };
        let (residual, y) = add_norm(&weight, None);
        prop_assert_eq!(add_norm(&moved, Some(&order)), (residual, reordered(&y, &columns)));
        let mut y = x.clone();
        Cpu.reorder(&order, MatMut::new(&mut y[..], rows, cols).unwrap()).unwrap();
        prop_assert_eq!(y, reordered(&x, &columns));
    }
}

#[test]
fn layers_without_an_order_take_x_as_it_is() {
    let packed = layer(Bits::B4, (128, 16), 32, 3);
    let ragged = {
        let mut parts = gptq_format::PackedParts {
            bits: packed.bits(),
            group_size: packed.group_size(),
            in_features: packed.in_features(),
            out_features: packed.out_features(),
            qweight: packed.qweight().to_vec(),
            qzeros: packed.qzeros().to_vec(),
            scales: packed.scales().to_vec(),
            g_idx: packed.g_idx().to_vec(),
            bias: None,
        };
        parts.g_idx[0] = (parts.g_idx[0] + 1) % 4;
        PackedLinear::from_parts(parts).unwrap()
    };
    assert_eq!(LinearSpec::of_in_order(&ragged), LinearSpec::of(&ragged));
    for kernel in cpu::kernels() {
        let layer = kernel.prepare_in_order(&ragged, &Fusion::default()).unwrap();
        assert_eq!(layer.input_order(), None, "{}", kernel.name());
        assert_eq!(layer.spec(), &LinearSpec::of(&ragged));
        // One that was not asked to.
        assert_eq!(kernel.prepare(&packed).unwrap().input_order(), None);
    }
    // The norm's sum of squares is of x as it is.
    let reference = cpu::kernels().pop().unwrap();
    let norm = RmsNorm { weight: &[1.0; 128], eps: 1e-5 };
    let fusion = Fusion { norm: Some(norm), epilogue: Epilogue::Store };
    assert_eq!(reference.prepare_in_order(&packed, &fusion).unwrap().input_order(), None);
}

/// Down takes what gate and up give: once their outputs are permuted, nobody has to do anything.
#[test]
fn outputs_of_one_layer_are_in_the_order_of_the_next() {
    let (hidden, inner) = (64, 96);
    let (gate_up, down) =
        (layer(Bits::B4, (hidden, 2 * inner), 32, 7), layer(Bits::B4, (inner, hidden), 32, 8));
    let reference = cpu::kernels().pop().unwrap();
    let silu = Epilogue::SiluMul.into();
    let x = noise(3 * hidden, 9);
    let run = |gate_up: &PackedLinear, down: &dyn Linear<Cpu>| {
        let (mut middle, mut y) = (vec![0.0; 3 * inner], vec![0.0; 3 * hidden]);
        forward(reference.prepare_fused(gate_up, &silu).unwrap().as_ref(), &x, &mut middle);
        forward(down, &middle, &mut y);
        y
    };
    let in_order = reference.prepare_in_order(&down, &Fusion::default()).unwrap();
    let order = in_order.input_order().unwrap();
    let both: Vec<u32> = order.iter().copied().chain(order.iter().map(|&i| i + inner as u32)).collect();
    let got = run(&gate_up.with_output_order(&both).unwrap(), in_order.as_ref());
    let want = run(&gate_up, reference.prepare(&down).unwrap().as_ref());
    // The same products, added in float64 in another order and rounded to float32 once.
    let bound = |want: f32| 2.0 * f32::EPSILON * (1.0 + want.abs());
    assert!(got.iter().zip(&want).all(|(got, want)| (got - want).abs() <= bound(*want)), "{got:?} {want:?}");
}

#[test]
fn attention_writes_in_order() {
    let shape = AttentionShape { heads: 4, kv_heads: 2, head_dim: 8, window: None };
    let (rows, cols, width) = (5, shape.qkv_features(), shape.out_features());
    let columns = shuffled(width, 4);
    let order = Cpu.order(&columns).unwrap();
    let (cos, sin) = (noise(rows * 4, 1), noise(rows * 4, 2));
    let attend = |order| {
        let kv = KvShape { layers: 1, kv_heads: 2, head_dim: 8, pages: 1, format: KvFormat::Activations };
        let (mut store, rope) = (Cpu.kv_store(kv).unwrap(), Cpu.rope(&cos, &sin, 8).unwrap());
        let mut step = Cpu.new_step().unwrap();
        let sequences = [SequencePlan { rows: 0..rows, past: 0, pages: &[0] }];
        let plan = StepPlan { tokens: &[0; 5], sequences: &sequences, ..StepPlan::default() };
        Cpu.set_step(&mut step, &plan).unwrap();
        let (mut qkv, mut y) = (noise(rows * cols, 3), vec![f32::NAN; rows * width]);
        let mut workspace = Workspace::new(&Cpu, Cpu.attention_workspace_len(&step, shape)).unwrap();
        let qkv = MatMut::new(&mut qkv[..], rows, cols).unwrap();
        let into = MatMut::new(&mut y[..], rows, width).unwrap();
        Cpu.attend(0, shape, &step, &rope, qkv, &mut store, order, into, &mut workspace).unwrap();
        y
    };
    assert_eq!(attend(Some(&order)), reordered(&attend(None), &columns));
}

#[test]
fn orders_are_checked() {
    for wrong in [&[0, 0][..], &[0, 2], &[1]] {
        let error = Cpu.order(wrong).err();
        assert!(
            matches!(error, Some(KernelError::Argument { what: "column of an order", .. })),
            "{wrong:?}: {error:?}"
        );
    }
    let order = Cpu.order(&[1, 0]).unwrap();
    let mut y = [0.0; 3];
    let wrong = Cpu.reorder(&order, MatMut::new(&mut y[..], 1, 3).unwrap());
    assert!(matches!(wrong, Err(KernelError::Shape { argument: "order", cols: 3, got_cols: 2, .. })));
}
