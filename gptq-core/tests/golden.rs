//! Parity with GPTQModel 7.7.0 on every file of `tests/golden`.
//!
//! Each file holds a weight and calibration inputs, and the codes, scales, zeros and g_idx that the reference made of them.

use std::path::{Path, PathBuf};

use gptq_core::{BlockedCholesky, Factorize, Gptq, GptqConfig, Hessian, HessianAccumulator, QuantizedWeight};
use ndarray::{Array1, Array2};
use safetensors::{SafeTensors, tensor::TensorView};
use serde_json::Value;

struct Golden {
    name: String,
    config: GptqConfig,
    weight: Array2<f32>,
    inputs: Array2<f32>,
    codes: Array2<i32>,
    scales: Array2<f32>,
    zeros: Array2<i32>,
    g_idx: Array1<i32>,
    relative_output_error: f64,
}

impl Golden {
    fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).expect("readable");
        let (_, header) = SafeTensors::read_metadata(&bytes).expect("safetensors");
        let metadata = header.metadata().clone().expect("metadata");
        let tensors = SafeTensors::deserialize(&bytes).expect("safetensors");
        let tensor = |name: &str| tensors.tensor(name).expect("tensor");
        let config: Value = serde_json::from_str(&metadata["config"]).expect("JSON");
        let flag = |key: &str| config[key].as_bool().expect("boolean");
        let group_size = usize::try_from(config["group_size"].as_i64().expect("integer")).ok();
        let mse = config["mse"].as_f64().expect("number") as f32;
        Self {
            name: path.file_stem().expect("name").to_string_lossy().into_owned(),
            config: GptqConfig::builder()
                .bits(config["bits"].as_u64().expect("integer") as u32)
                .group_size(group_size)
                .sym(flag("sym"))
                .desc_act(flag("desc_act"))
                .act_group_aware(flag("act_group_aware"))
                .static_groups(flag("static_groups"))
                .mse((mse > 0.0).then_some(mse))
                .damp_percent(metadata["effective_damp_percent"].parse().expect("number"))
                .build()
                .expect("valid"),
            weight: matrix(&tensor("weight"), f32::from_le_bytes),
            inputs: matrix(&tensor("inputs"), f32::from_le_bytes),
            codes: matrix(&tensor("codes"), i32::from_le_bytes),
            scales: matrix(&tensor("scales"), f32::from_le_bytes),
            zeros: matrix(&tensor("zeros"), i32::from_le_bytes),
            g_idx: elements(&tensor("g_idx"), i32::from_le_bytes).into(),
            relative_output_error: metadata["relative_output_error"].parse().expect("number"),
        }
    }

    fn hessian(&self) -> Hessian {
        let mut accumulator = HessianAccumulator::new(self.inputs.ncols());
        accumulator.add_batch(self.inputs.view()).expect("good inputs");
        accumulator.finish().expect("samples")
    }

    /// `|X (W - W_q)^T|^2 / |X W^T|^2`, in float64.
    fn relative_output_error(&self, dequantized: &Array2<f32>) -> f64 {
        let inputs = self.inputs.mapv(f64::from);
        let norm = |w: Array2<f64>| inputs.dot(&w.t()).iter().map(|y| y * y).sum::<f64>();
        norm((&self.weight - dequantized).mapv(f64::from)) / norm(self.weight.mapv(f64::from))
    }
}

fn elements<T>(tensor: &TensorView<'_>, from_bytes: impl Fn([u8; 4]) -> T) -> Vec<T> {
    tensor.data().chunks_exact(4).map(|b| from_bytes(b.try_into().expect("four bytes"))).collect()
}

fn matrix<T>(tensor: &TensorView<'_>, from_bytes: impl Fn([u8; 4]) -> T) -> Array2<T> {
    let shape = (tensor.shape()[0], tensor.shape()[1]);
    Array2::from_shape_vec(shape, elements(tensor, from_bytes)).expect("as many as the shape says")
}

#[expect(clippy::print_stderr, reason = "a skipped test says why")]
/// The golden files; empty, with a printed reason, in the published package, which leaves them out.
fn golden_files() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let Ok(entries) = std::fs::read_dir(&folder) else {
        eprintln!("skipped: {} is absent", folder.display());
        return Vec::new();
    };
    let mut files: Vec<_> = entries.map(|entry| entry.expect("readable").path()).collect();
    files.sort();
    assert!(files.len() >= 14, "golden files are missing: {files:?}");
    files
}

#[test]
fn codes_equal_the_reference() {
    for path in golden_files() {
        let golden = Golden::read(&path);
        let name = &golden.name;
        let quantized = Gptq::new(golden.config.clone()).quantize(golden.weight.view(), golden.hessian());
        let quantized = quantized.expect("quantisable");
        let differing =
            quantized.codes.iter().zip(&golden.codes).filter(|(a, b)| i32::from(**a) != **b).count();
        assert!(
            differing * 1000 <= golden.codes.len(),
            "{name}: {differing} codes of {} differ",
            golden.codes.len()
        );
        assert!(
            quantized.zeros.iter().map(|&z| i32::from(z)).eq(golden.zeros.iter().copied()),
            "{name}: zeros"
        );
        assert!(quantized.g_idx.iter().map(|&g| g as i32).eq(golden.g_idx.iter().copied()), "{name}: g_idx");
        let error = golden.relative_output_error(&quantized.dequantize());
        let expected = golden.relative_output_error;
        assert!(
            (error / expected - 1.0).abs() < 0.005,
            "{name}: output error {error:e}, reference {expected:e}"
        );
        println!("{name}: {differing} codes differ, output error {error:e} (reference {expected:e})");
        assert_loss_is_the_output_error(&golden, &quantized);
    }
}

/// The reported loss is `tr(D H D^T) / 2` of the damped Hessian, recomputed from nothing but inputs and result.
fn assert_loss_is_the_output_error(golden: &Golden, quantized: &QuantizedWeight) {
    let hessian = golden.hessian();
    let damped = damped(&hessian, golden.config.damp_percent());
    // Weights of dead columns are zero to GPTQ, and so are they here.
    let mut weight = golden.weight.clone();
    for &column in &quantized.report.dead_columns {
        weight.column_mut(column).fill(0.0);
    }
    let recomputed = Hessian::from_matrix(damped, 1)
        .expect("symmetric")
        .output_error((&weight - &quantized.dequantize()).view())
        .expect("same shape");
    let reported = quantized.report.loss.expect("GPTQ has a loss");
    // The column loop keeps running weights in float32. Each of up to I = 256 updates rounds by eps |w|, eps = 2^-24, and
    // the final error (w - q) / U is a difference of nearly equal numbers, about a step s of the grid in size, so its
    // relative error is at most 256 eps max|w| / s <= 256 * 2^-24 * 2^bits = 2^(bits - 16) for weights that stay in the
    // grid's range; the loss is quadratic in it: twice that.
    let bound = 2.0 * 2f64.powi(golden.config.bits() as i32 - 16);
    let relative = (reported / recomputed - 1.0).abs();
    assert!(relative < bound, "{}: loss {reported:e}, recomputed {recomputed:e}", golden.name);
}

/// The Hessian as it is factorised, in natural order.
fn damped(hessian: &Hessian, damp: f64) -> Array2<f64> {
    let mut damped = hessian.matrix().to_owned();
    let mut diagonal = damped.diag_mut();
    diagonal.mapv_inplace(|d| if d == 0.0 { 1.0 } else { d });
    let mean = diagonal.mean().expect("not empty");
    diagonal += damp * mean;
    damped
}

/// Every code of the reference is the rounding of our value, given the reference's earlier codes, or that value is a tie.
///
/// Replaying the column loop on the reference's own codes checks each code by itself: one flipped tie moves all later
/// values of its row, so plain comparison could not tell a second tie from an error.
#[test]
fn differing_codes_are_rounding_ties() {
    for path in golden_files() {
        let golden = Golden::read(&path);
        let (rows, columns) = golden.weight.dim();
        let order = processing_order(&golden);
        let hessian = golden.hessian();
        let natural = damped(&hessian, golden.config.damp_percent());
        let permuted = Array2::from_shape_fn((columns, columns), |(i, j)| natural[[order[i], order[j]]]);
        let upper = BlockedCholesky.inverse_cholesky(permuted).expect("positive definite");
        let max_code = f64::from(golden.config.max_code());
        for row in 0..rows {
            let mut w: Vec<f64> =
                order
                    .iter()
                    .map(|&c| {
                        if hessian.matrix()[[c, c]] == 0.0 { 0.0 } else { f64::from(golden.weight[[row, c]]) }
                    })
                    .collect();
            for position in 0..columns {
                let column = order[position];
                let group = golden.g_idx[column] as usize;
                let scale = f64::from(golden.scales[[row, group]]);
                let zero = f64::from(golden.zeros[[row, group]]);
                let code = f64::from(golden.codes[[row, column]]);
                let value = w[position] / scale;
                let distance = ((value + zero).clamp(0.0, max_code) - code).abs();
                assert!(
                    distance <= 0.5 + 1e-4,
                    "{}: row {row}, column {column}: value {value}, code {code}, zero {zero}",
                    golden.name
                );
                let error = (w[position] - scale * (code - zero)) / upper[[position, position]];
                for (w, u) in w[position..].iter_mut().zip(upper.row(position).iter().skip(position)) {
                    *w -= error * u;
                }
            }
        }
    }
}

/// The order of quantisation, restated independently of the library.
fn processing_order(golden: &Golden) -> Vec<usize> {
    let hessian = golden.hessian();
    let energy = |c: usize| if hessian.matrix()[[c, c]] == 0.0 { 1.0 } else { hessian.matrix()[[c, c]] };
    let mut order: Vec<usize> = (0..golden.weight.ncols()).collect();
    let by_energy = |a: &usize, b: &usize| energy(*b).total_cmp(&energy(*a));
    if golden.config.desc_act() {
        order.sort_by(by_energy);
    } else if golden.config.act_group_aware() {
        let group_size = golden.config.group_size().expect("groups").get();
        assert_eq!(order.len() % group_size, 0, "a golden file with a ragged tail needs more care here");
        let group_energy = |c: &usize| {
            let first = c / group_size * group_size;
            (first..first + group_size).map(energy).fold(0.0, f64::max)
        };
        order.sort_by(|a, b| {
            group_energy(b).total_cmp(&group_energy(a)).then_with(|| by_energy(a, b)).then(a.cmp(b))
        });
    }
    order
}
