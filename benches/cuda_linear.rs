//! Linear layers on a GPU, as a decoder would run them: recorded in a CUDA graph, over rotated copies of the weight.
//!
//! ```text
//! cargo bench -p gptq-benches --features cuda --bench cuda_linear [-- [--tsv] [--selected] [--costs=FILE] [--kernels=NAME,...] FILTER...]
//! ```
//!
//! Copies of a layer are together at least 512 MB, so that no time is one that the L2 cache has served. Times are medians
//! of replays, after each of which the GPU rests if there are many rows, with the fastest and slowest beside them; errors
//! are of the same kernel on the same data, against float64, as `|y - exact| / |exact|` over 64 outputs of every row. FILTER keeps the lines that contain one of them, such as
//! `4096x11008 fp16 sym M=1 `. Without names of kernels, all run but `cuda-plain`, which is there to be right; with
//! `--selected`, only those that `select()` takes for some of the lines. Without a GPU it says so. `--tsv` prints lines for another program, `peers/gpu_linear.py`: shape, type, kind, rows, kernel,
//! median, fastest, slowest, error, 1 if `select()` takes this kernel for calls of so many rows, separated by tabs. It goes by the
//! costs that ship, or by those in FILE.

// A table on the terminal is what this program is for, and it ends with the first error.
#![allow(clippy::print_stdout, clippy::unwrap_used)]

mod layer;

use std::{path::Path, thread, time::Duration};

use cudarc::driver::sys;
use gptq_format::Bits;
use gptq_kernels::{
    CostTable, Device, Epilogue, KernelError, Linear, LinearSpec, MatMut, MatRef, Selector, Workload,
    Workspace,
    cuda::{self, CudaDevice, Element},
    reference::Reference,
};
use half::{bf16, f16};
use layer::{Layer, symmetric};

/// Input features, output features.
const SHAPES: [(usize, usize); 4] = [(4096, 4096), (4096, 11008), (11008, 4096), (8192, 28672)];
const ROWS: [usize; 10] = [1, 2, 4, 8, 16, 32, 64, 256, 1024, 2048];
const GROUP: usize = 128;
const ROTATED_BYTES: usize = 512 << 20;
const REPLAYS: usize = 15;
/// With so many rows or more, the GPU rests three times as long as a replay took after each: it is at its power limit
/// otherwise, and a time depends on how long it has been busy.
const RESTING_ROWS: usize = 256;
/// A kernel that takes this many times as long as another at some number of rows is not timed at larger ones.
const HOPELESS: f32 = 8.0;

#[derive(Clone, Copy)]
struct Kind {
    name: &'static str,
    bits: Bits,
    group: usize,
    sym: bool,
    act_order: bool,
    /// Whether x comes in the layer's order.
    in_order: bool,
    epilogue: Epilogue,
}

const SYM: Kind = Kind {
    name: "sym",
    bits: Bits::B4,
    group: GROUP,
    sym: true,
    act_order: false,
    in_order: false,
    epilogue: Epilogue::Store,
};
const KINDS: [Kind; 7] = [
    SYM,
    Kind { name: "asym", sym: false, ..SYM },
    Kind { name: "act", act_order: true, ..SYM },
    Kind { name: "in-order", act_order: true, in_order: true, ..SYM },
    Kind { name: "sym8", bits: Bits::B8, ..SYM },
    Kind { name: "g64", group: 64, ..SYM },
    Kind { name: "g32", group: 32, ..SYM },
];

/// The layers of a Llama-2-7B decoder, fused: q, k and v; o; gate and up; down.
const DECODER: [(usize, usize, Kind); 4] = [
    (4096, 12288, Kind { name: "qkv", ..SYM }),
    (4096, 4096, Kind { name: "add", epilogue: Epilogue::Add, ..SYM }),
    (4096, 22016, Kind { name: "silu", epilogue: Epilogue::SiluMul, ..SYM }),
    (11008, 4096, Kind { name: "add", epilogue: Epilogue::Add, ..SYM }),
];

/// Median, fastest and slowest microseconds of one layer of `layers`, with `rows` rows; and the relative error.
fn measure<T: Element>(
    device: &CudaDevice<T>,
    layers: &[Box<dyn Linear<CudaDevice<T>>>],
    reference: &Reference,
    rows: usize,
) -> ([f32; 3], f64) {
    let (k, n) = (layers[0].spec().in_features, layers[0].spec().y_features());
    let mut x_host: Vec<f32> = (0..rows * k).map(|i| symmetric(i as u64)).collect();
    let (mut x, mut y) = (device.alloc(rows * k).unwrap(), device.alloc(rows * n).unwrap());
    device.upload(&x_host, CudaDevice::slice_mut(&mut x, 0..rows * k)).unwrap();
    device.download(CudaDevice::slice(&x, 0..rows * k), &mut x_host).unwrap();
    if let Some(order) = layers[0].input_order() {
        let moved = x_host.chunks(k).flat_map(|row| order.iter().map(|&column| row[column as usize]));
        let moved: Vec<f32> = moved.collect();
        device.upload(&moved, CudaDevice::slice_mut(&mut x, 0..rows * k)).unwrap();
    }
    let mut workspace = Workspace::new(device, layers[0].workspace_len(rows)).unwrap();
    let stream = device.stream();
    stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    for layer in layers {
        let x = MatRef::new(CudaDevice::slice(&x, 0..rows * k), rows, k).unwrap();
        let y = MatMut::new(CudaDevice::slice_mut(&mut y, 0..rows * n), rows, n).unwrap();
        layer.forward(x, y, &mut workspace).unwrap();
    }
    let graph =
        stream.end_capture(sys::CUgraphInstantiate_flags(0)).unwrap().expect("something was recorded");
    let event = || stream.context().new_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT)).unwrap();
    let (start, end) = (event(), event());
    let mut times: Vec<f32> = (0..REPLAYS + 2)
        .map(|_| {
            start.record(stream).unwrap();
            graph.launch().unwrap();
            end.record(stream).unwrap();
            let milliseconds = start.elapsed_ms(&end).unwrap();
            if rows >= RESTING_ROWS {
                thread::sleep(Duration::from_secs_f32(3.0 * milliseconds / 1e3));
            }
            1000.0 * milliseconds / layers.len() as f32
        })
        .skip(2)
        .collect();
    times.sort_by(f32::total_cmp);

    // Once more, since `Epilogue::Add` has added up all of them.
    let mut got = vec![0.0; rows * n];
    device.upload(&got, CudaDevice::slice_mut(&mut y, 0..rows * n)).unwrap();
    layers[0]
        .forward(
            MatRef::new(CudaDevice::slice(&x, 0..rows * k), rows, k).unwrap(),
            MatMut::new(CudaDevice::slice_mut(&mut y, 0..rows * n), rows, n).unwrap(),
            &mut workspace,
        )
        .unwrap();
    device.download(CudaDevice::slice(&y, 0..rows * n), &mut got).unwrap();
    let (mut error, mut size) = (0.0, 0.0);
    for row in 0..rows {
        // Of many rows, some.
        if rows > 64 && row % 61 != 0 {
            continue;
        }
        for output in (0..n).step_by(n / 64) {
            let p = |output| reference.element(&x_host[row * k..][..k], output).y;
            let exact = match layers[0].spec().epilogue {
                Epilogue::Store | Epilogue::Add => p(output),
                Epilogue::SiluMul => p(output) / (1.0 + (-p(output)).exp()) * p(output + n),
            };
            error += (f64::from(got[row * n + output]) - exact).powi(2);
            size += exact * exact;
        }
    }
    ([times[REPLAYS / 2], times[0], times[REPLAYS - 1]], (error / size).sqrt())
}

/// What the command line says.
struct Options {
    tsv: bool,
    only_selected: bool,
    costs: Option<String>,
    names: Vec<String>,
    filters: Vec<String>,
}

fn table<T: Element>(dtype: &str, options: &Options) {
    let Options { tsv, only_selected, costs, names, filters } = options;
    let (tsv, only_selected) = (*tsv, *only_selected);
    let device = match CudaDevice::<T>::new(0) {
        Ok(device) => device,
        Err(reason) => return println!("not run: {reason}"),
    };
    if !tsv {
        let context = device.stream().context();
        println!("{}, {dtype}, groups of {GROUP}", context.name().unwrap_or_default());
        println!(
            "line                                kernel             us (fastest, slowest)      TB/s  error"
        );
    }
    let kernels = cuda::kernels(&device);
    let costs = match costs {
        Some(file) => Some(CostTable::load(Path::new(file), &device.model()).unwrap()),
        None => CostTable::shipped(&device.model()),
    };
    let selected = |spec: &LinearSpec, rows| {
        let selector = Selector::new().workload(Workload::rows(rows));
        let selector = costs.iter().fold(selector, Selector::costs);
        selector.select(&kernels, spec).unwrap().1.kernel
    };
    let plain = SHAPES.into_iter().flat_map(|(k, n)| KINDS.map(|kind| (k, n, kind)));
    for (k, n, kind) in plain.chain(DECODER) {
        let line = |rows| format!("{k}x{n} {dtype} {} M={rows} ", kind.name);
        let wanted = |rows| filters.is_empty() || filters.iter().any(|filter| line(rows).contains(filter));
        if !ROWS.into_iter().any(wanted) {
            continue;
        }
        let Kind { bits, group: group_size, sym, act_order, .. } = kind;
        let packed = Layer { in_features: k, out_features: n, bits, group_size, sym, act_order }.packed();
        let spec = LinearSpec::of(&packed).fused(&kind.epilogue.into());
        let reference = Reference::new(&packed);
        let mut least = [f32::INFINITY; ROWS.len()];
        for kernel in &kernels {
            let named = match &names[..] {
                [] => kernel.name() != "cuda-plain",
                names => names.iter().any(|name| name == kernel.name()),
            };
            let taken =
                || ROWS.into_iter().any(|rows| wanted(rows) && selected(&spec, rows) == kernel.name());
            if !named || only_selected && !taken() {
                continue;
            }
            let prepare = || match kind.in_order {
                true => kernel.prepare_in_order(&packed, &kind.epilogue.into()),
                false => kernel.prepare_fused(&packed, &kind.epilogue.into()),
            };
            let first = match prepare() {
                Ok(first) => first,
                Err(KernelError::Unsupported { .. }) => continue,
                Err(error) => panic!("{error}"),
            };
            let copies = ROTATED_BYTES.div_ceil(first.weight_bytes()).max(6);
            let mut layers = vec![first];
            layers.extend((1..copies).map(|_| prepare().unwrap()));
            let mut hopeless = false;
            for (rows, least) in ROWS.into_iter().zip(&mut least).filter(|&(rows, _)| wanted(rows)) {
                if hopeless {
                    break;
                }
                let ([median, fastest, slowest], error) = measure(&device, &layers, &reference, rows);
                *least = least.min(median);
                hopeless = median > HOPELESS * *least;
                if tsv {
                    let (name, kind) = (kernel.name(), kind.name);
                    let selected = u8::from(selected(layers[0].spec(), rows) == name);
                    println!(
                        "{k}x{n}\t{dtype}\t{kind}\t{rows}\t{name}\t{median}\t{fastest}\t{slowest}\t{error:e}\t{selected}"
                    );
                    continue;
                }
                let rate = layers[0].weight_bytes() as f32 / median / 1e6;
                println!(
                    "{:<35} {:<18} {median:7.2} ({fastest:7.2}, {slowest:7.2})  {rate:5.2}  {error:.1e}",
                    line(rows),
                    kernel.name()
                );
            }
        }
    }
}

fn main() {
    let (options, filters): (Vec<String>, Vec<String>) =
        std::env::args().skip(1).partition(|arg| arg.starts_with("--"));
    let has = |flag: &str| options.iter().any(|option| option == flag);
    let value = |flag| options.iter().find_map(|option| option.strip_prefix(flag));
    let options = Options {
        tsv: has("--tsv"),
        only_selected: has("--selected"),
        costs: value("--costs=").map(str::to_owned),
        names: value("--kernels=")
            .into_iter()
            .flat_map(|names| names.split(',').map(str::to_owned))
            .collect(),
        filters,
    };
    table::<f16>("fp16", &options);
    table::<bf16>("bf16", &options);
}
