//! Folders for inputs that have to be files.

use std::cell::RefCell;
use std::path::{Path, PathBuf};

/// A folder of this process and thread, in memory where the system has such a place; removed at the end of the process.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

thread_local! {
    static SCRATCH: RefCell<Option<Scratch>> = const { RefCell::new(None) };
}

/// An empty folder of this name.
pub(crate) fn empty(name: &str) -> PathBuf {
    SCRATCH.with_borrow_mut(|scratch| {
        let scratch = scratch.get_or_insert_with(|| {
            let memory = Path::new("/dev/shm");
            let base = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
            let thread = format!("{:?}", std::thread::current().id());
            let thread: String = thread.chars().filter(char::is_ascii_digit).collect();
            Scratch(base.join(format!("gptq-fuzz-{}-{thread}", std::process::id())))
        });
        let folder = scratch.0.join(name);
        if folder.exists() {
            std::fs::remove_dir_all(&folder).expect("the scratch folder can be emptied");
        }
        std::fs::create_dir_all(&folder).expect("the scratch folder can be made");
        folder
    })
}
