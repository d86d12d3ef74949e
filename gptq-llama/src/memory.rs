//! How much memory the process takes.

/// Bytes of memory that no file backs and that is not swapped out; `None` where the system does not tell. Mapped weights
/// are not counted: the system takes their memory back when it is short of it.
pub(crate) fn resident_anonymous() -> Option<u64> {
    if !cfg!(target_os = "linux") {
        return None;
    }
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    parse(&status)
}

fn parse(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kilobytes.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_proc() {
        assert_eq!(parse("VmRSS:\t  100 kB\nRssAnon:\t    1234 kB\nRssFile:\t 5 kB\n"), Some(1234 * 1024));
        assert_eq!(parse("VmRSS:\t  100 kB\n"), None);
        if cfg!(target_os = "linux") {
            assert!(resident_anonymous().is_some_and(|bytes| bytes > 0));
        }
    }
}
