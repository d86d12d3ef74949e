//! Calls that share a GPU with others, are recorded, or come from another program.

use super::*;

#[test]
fn two_streams_at_once_do_not_meet() {
    for rows in [2, 20] {
        two_streams(&Layer::new(4096, 2048), rows, |_| true);
    }
    two_streams(&Layer::new(SHARED.0, SHARED.1), SHARED.2, |kernel| kernel == SHARED_BY);
}

fn two_streams(layer: &Layer, rows: usize, wanted: fn(&str) -> bool) {
    each::<f16>(layer, |device, kernel, packed| {
        if !wanted(kernel.name()) {
            return;
        }
        let streams: Vec<Arc<CudaStream>> =
            (0..2).map(|_| device.stream().context().new_stream().unwrap()).collect();
        let mut random = Random(13);
        let layer = Running::new(device, kernel, packed, rows, |_| random.symmetric()).unwrap();
        let alone = layer.forward().unwrap();
        let layer = &layer;
        std::thread::scope(|scope| {
            for stream in &streams {
                let device = device.with_stream(Arc::clone(stream));
                let alone = &alone;
                scope.spawn(move || {
                    let (inputs, outputs) = (packed.in_features(), packed.out_features());
                    let mut buffer = device.alloc(rows * outputs).unwrap();
                    let mut x = device.alloc(rows * inputs).unwrap();
                    device.upload(&layer.x_host, CudaDevice::slice_mut(&mut x, 0..rows * inputs)).unwrap();
                    let mut workspace = Workspace::new(&device, layer.layer.workspace_len(rows)).unwrap();
                    for _ in 0..50 {
                        for _ in 0..20 {
                            layer
                                .layer
                                .forward(
                                    MatRef::new(CudaDevice::slice(&x, 0..rows * inputs), rows, inputs)
                                        .unwrap(),
                                    MatMut::new(
                                        CudaDevice::slice_mut(&mut buffer, 0..rows * outputs),
                                        rows,
                                        outputs,
                                    )
                                    .unwrap(),
                                    &mut workspace,
                                )
                                .unwrap();
                        }
                        let mut y = vec![0.0; rows * outputs];
                        device.download(CudaDevice::slice(&buffer, 0..y.len()), &mut y).unwrap();
                        assert!(y.iter().zip(alone).all(|(a, b)| a.to_bits() == b.to_bits()));
                    }
                });
            }
        });
    });
}

#[test]
fn a_forward_pass_can_be_recorded_and_replayed() {
    for rows in [1, 20] {
        record_and_replay(&Layer::new(1024, 512), rows, |_| true);
    }
    record_and_replay(&Layer::new(SHARED.0, SHARED.1), SHARED.2, |kernel| kernel == SHARED_BY);
}

fn record_and_replay(layer: &Layer, rows: usize, wanted: fn(&str) -> bool) {
    each::<f16>(layer, |device, kernel, packed| {
        if !wanted(kernel.name()) {
            return;
        }
        let (inputs, outputs) = (packed.in_features(), packed.out_features());
        // A second stream switches cudarc's event tracking on, were it not for what `CudaDevice::new` does.
        let _second = device.stream().context().new_stream().unwrap();
        let mut random = Random(17);
        let run = Running::new(device, kernel, packed, rows, |_| random.symmetric()).unwrap();
        let expected = run.forward().unwrap();
        let mut y = device.alloc(rows * outputs).unwrap();
        let mut workspace = Workspace::new(device, run.layer.workspace_len(rows)).unwrap();
        // A device that has loaded nothing yet, so that what a kernel loads late is loaded while the graph is recorded.
        let fresh = CudaDevice::<f16>::on(Arc::clone(device.stream())).unwrap();
        let kernels = cuda::kernels(&fresh);
        let same = kernels.iter().find(|other| other.name() == kernel.name()).unwrap();
        let layer = same.prepare(packed).unwrap();
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        device.stream().begin_capture(mode).unwrap();
        for _ in 0..3 {
            layer
                .forward(
                    MatRef::new(CudaDevice::slice(&run.x, 0..rows * inputs), rows, inputs).unwrap(),
                    MatMut::new(CudaDevice::slice_mut(&mut y, 0..rows * outputs), rows, outputs).unwrap(),
                    &mut workspace,
                )
                .unwrap();
        }
        let flags = sys::CUgraphInstantiate_flags(0);
        let graph = device.stream().end_capture(flags).unwrap().expect("something was recorded");
        for _ in 0..2 {
            graph.launch().unwrap();
            let mut got = vec![0.0; rows * outputs];
            device.download(CudaDevice::slice(&y, 0..rows * outputs), &mut got).unwrap();
            assert_eq!(got, expected, "{}", kernel.name());
        }
    });
}

#[test]
fn a_caller_may_bring_its_own_context_stream_and_slices() {
    if gpu::<f16>().is_none() {
        return;
    }
    let context = cudarc::driver::CudaContext::new(0).unwrap();
    let stream = context.new_stream().unwrap();
    let device = CudaDevice::<f16>::on(Arc::clone(&stream)).unwrap();
    let packed = Layer::new(512, 64).pack();
    for kernel in cuda::kernels(&device) {
        if kernel.supports(&LinearSpec::of(&packed)).is_err() {
            continue;
        }
        let layer = kernel.prepare(&packed).unwrap();
        let x_host: Vec<f16> = (0..512).map(|i| f16::from_f32((i % 7) as f32 - 3.0)).collect();
        let x = stream.clone_htod(&x_host).unwrap();
        let mut y = stream.alloc_zeros::<f16>(64 + 8).unwrap();
        let mut workspace = Workspace::new(&device, layer.workspace_len(1)).unwrap();
        let (x, mut into) = (MatRef::new((&x).into(), 1, 512).unwrap(), y.slice_mut(8..));
        layer.forward(x, MatMut::new(into.slice_mut(..).into(), 1, 64).unwrap(), &mut workspace).unwrap();
        let got = stream.clone_dtoh(&y).unwrap();
        assert!(got[..8].iter().all(|&margin| margin == f16::ZERO));
        let (reference, bound) = (Reference::new(&packed), kernel.error_bound(&LinearSpec::of(&packed)));
        let x: Vec<f32> = x_host.iter().map(|x| x.to_f32()).collect();
        for (output, got) in got[8..].iter().enumerate() {
            let exact = reference.element(&x, output);
            let error = (got.to_f64() - exact.y).abs();
            assert!(error <= bound.of(exact.magnitude, exact.y, exact.weight_sum), "{}", kernel.name());
        }
    }
}
