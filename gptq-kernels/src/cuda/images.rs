//! Kernels of the images, compiled by the driver one at a time: when a kernel is first asked for, or before that in the
//! background. A kernel is a module of its own, so that nothing is compiled which is never run.

use std::{
    collections::HashMap,
    ffi::CString,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    thread::{self, JoinHandle},
};

use cudarc::driver::{CudaContext, result, sys};

use super::{
    driver::Function,
    failure::gpu_error,
    image::{self, Image},
    module::Module,
};
use crate::KernelError;

/// A kernel's module, empty until it is loaded; locked while it is.
type Slot = Arc<Mutex<Option<Arc<Module>>>>;

/// PTX by image, unpacked when it is first asked for; nothing if the archive is damaged.
type Texts = Mutex<HashMap<&'static str, Arc<OnceLock<Option<Arc<str>>>>>>;

/// The images of one context.
pub(super) struct Images {
    context: Arc<CudaContext>,
    /// PTX of images of which a kernel was asked for.
    texts: Arc<Texts>,
    /// By image and kernel.
    loaded: Mutex<HashMap<(&'static str, String), Slot>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// The value, made by `make` if there is none yet.
pub(super) fn get_or_load<V>(
    cell: &OnceLock<V>,
    make: impl FnOnce() -> Result<V, KernelError>,
) -> Result<&V, KernelError> {
    if let Some(value) = cell.get() {
        return Ok(value);
    }
    let value = make()?;
    // Another thread may have been first; its value is as good.
    Ok(cell.get_or_init(|| value))
}

/// What panicked with the lock changed nothing by halves.
fn lock<V>(mutex: &Mutex<V>) -> MutexGuard<'_, V> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn missing(name: &str, entry: &str) -> KernelError {
    KernelError::Gpu { during: "loading a kernel", message: format!("no {entry} in image {name}") }
}

impl Images {
    pub(super) fn new(context: Arc<CudaContext>) -> Self {
        Self { context, texts: Arc::default(), loaded: Mutex::default(), threads: Mutex::default() }
    }

    /// Function `entry` of image `name`, allowed to use `shared` bytes of dynamic shared memory.
    pub(super) fn function(&self, name: &str, entry: &str, shared: usize) -> Result<Function, KernelError> {
        self.context.bind_to_thread().map_err(|error| gpu_error("cuCtxSetCurrent", error))?;
        let image = image::find(name).ok_or_else(|| missing(name, entry))?;
        let slot = self.slot(image, entry);
        let mut loaded = lock(&slot);
        let module = match &*loaded {
            Some(module) => Arc::clone(module),
            None => {
                let ptx =
                    image::only(&text(&self.texts, image)?, entry).ok_or_else(|| missing(name, entry))?;
                let module = Arc::new(Module::new(&self.context, image.name, &ptx)?);
                tracing::debug!(image = image.name, entry, "kernel loaded");
                loaded.insert(module).clone()
            }
        };
        drop(loaded);
        let entry = CString::new(entry).map_err(|_| missing(name, entry))?;
        // SAFETY: the module is loaded, its context is bound to this thread, and `entry` is a C string.
        let handle = unsafe { result::module::get_function(module.handle, entry) }
            .map_err(|error| gpu_error("cuModuleGetFunction", error))?;
        if shared > 0 {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the handle is a function of a live module.
            unsafe { result::function::set_function_attribute(handle, attribute, shared as i32) }
                .map_err(|error| gpu_error("cuFuncSetAttribute", error))?;
        }
        Ok(Function { handle, module })
    }

    /// Has kernels of image `name` compiled in the background, each by a thread. What fails is told by
    /// [`function`](Self::function), which tries again.
    pub(super) fn compile(&self, name: &str, entries: impl IntoIterator<Item = &'static str>) {
        let Some(image) = image::find(name) else { return };
        let mut threads = lock(&self.threads);
        threads.retain(|thread| !thread.is_finished());
        for entry in entries {
            let slot = self.slot(image, entry);
            if slot.try_lock().is_ok_and(|loaded| loaded.is_some()) {
                continue;
            }
            let (context, texts) = (Arc::clone(&self.context), Arc::clone(&self.texts));
            let compile = move || {
                let mut loaded = lock(&slot);
                if loaded.is_some() || context.bind_to_thread().is_err() {
                    return;
                }
                let Ok(text) = text(&texts, image) else { return };
                let module = image::only(&text, entry).map(|ptx| Module::new(&context, image.name, &ptx));
                *loaded = module.and_then(Result::ok).map(Arc::new);
                let done = loaded.is_some();
                tracing::debug!(image = image.name, entry, done, "kernel compiled in the background");
            };
            threads.extend(thread::Builder::new().name(entry.into()).spawn(compile));
        }
    }

    fn slot(&self, image: &'static Image, entry: &str) -> Slot {
        Arc::clone(lock(&self.loaded).entry((image.name, entry.to_owned())).or_default())
    }
}

fn text(texts: &Texts, image: &'static Image) -> Result<Arc<str>, KernelError> {
    let damaged = || KernelError::Gpu { during: image.name, message: "the PTX image is damaged".into() };
    let text = Arc::clone(lock(texts).entry(image.name).or_default());
    text.get_or_init(|| image.ptx().map(Arc::from)).clone().ok_or_else(damaged)
}

impl Drop for Images {
    /// Waits for what is being compiled: the driver must not be called while the process ends.
    fn drop(&mut self) {
        for thread in lock(&self.threads).drain(..) {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;
    use crate::cuda::CudaDevice;

    #[test]
    #[allow(clippy::print_stdout)]
    fn kernels_are_there_whether_compiled_before_or_not() {
        let device = match CudaDevice::<f16>::new(0) {
            Ok(device) => device,
            Err(reason) => return println!("skipped: {reason}"),
        };
        let images = device.images();
        images.compile("plain-f16-4", ["plain", "no such kernel"]);
        images.compile("plain-f16-4", ["plain"]);
        images.compile("no such image", ["plain"]);
        for image in ["plain-f16-4", "plain-f16-8"] {
            assert!(images.function(image, "plain", 0).is_ok());
            assert!(matches!(images.function(image, "no such kernel", 0), Err(KernelError::Gpu { .. })));
        }
        assert!(matches!(images.function("no such image", "plain", 0), Err(KernelError::Gpu { .. })));
    }
}
