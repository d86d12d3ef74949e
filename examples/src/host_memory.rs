//! Memory of this process, where the system tells it as Linux does.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

/// A line of `/proc/self/status` in bytes.
fn status(field: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kilobytes| kilobytes * 1024)
}

/// What is in memory, mapped files included.
pub fn resident() -> Option<u64> {
    status("VmRSS")
}

/// The most that was in memory since the process began, mapped files included.
pub fn highest_resident() -> Option<u64> {
    status("VmHWM")
}

/// Watches memory that is no mapped file, once every millisecond, for its largest size.
pub struct Watch {
    peak: Arc<AtomicU64>,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Begins to watch.
    pub fn start() -> Self {
        let (peak, ended) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let thread = std::thread::spawn({
            let (peak, ended) = (Arc::clone(&peak), Arc::clone(&ended));
            move || {
                while !ended.load(Ordering::Relaxed) {
                    peak.fetch_max(status("RssAnon").unwrap_or(0), Ordering::Relaxed);
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        });
        Self { peak, ended, thread: Some(thread) }
    }

    /// The largest size seen; `None` where the system does not tell.
    pub fn peak(mut self) -> Option<u64> {
        self.end();
        Some(self.peak.load(Ordering::Relaxed)).filter(|&bytes| bytes > 0)
    }

    fn end(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A watch that panicked has seen nothing.
            let _ = thread.join();
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_large_vector_is_seen() {
        if !cfg!(target_os = "linux") {
            return;
        }
        let watch = super::Watch::start();
        let bytes = vec![1u8; 64 << 20];
        std::thread::sleep(std::time::Duration::from_millis(100));
        assert!(watch.peak().is_some_and(|peak| peak > bytes.len() as u64));
        assert!(super::highest_resident().is_some_and(|peak| peak > bytes.len() as u64));
        assert!(super::resident().is_some_and(|now| now > bytes.len() as u64));
    }
}
