//! Location of the bbcp double.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Returns the executable of the double.
pub(crate) fn double() -> &'static Path {
    static DOUBLE: OnceLock<PathBuf> = OnceLock::new();
    DOUBLE.get_or_init(|| {
        if let Some(path) = std::env::var_os("BBCP_DOUBLE") {
            return path.into();
        }
        let built = Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--package", "bbcp-double"])
            .status()
            .expect("cargo runs");
        assert!(built.success(), "the double does not build");
        // target/debug/deps/copy-0123 → target/debug/bbcp
        let test = std::env::current_exe().expect("a test has a path");
        let directory = test
            .ancestors()
            .nth(2)
            .expect("it lies in the target directory");
        directory.join("bbcp")
    })
}
