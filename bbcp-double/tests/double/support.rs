//! A directory for copies, and runs of a bbcp with a time limit.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Time limit of a run; far above the usual time, since two busy cores are slow.
const PATIENCE: Duration = Duration::from_secs(40);

/// The double.
pub(crate) const DOUBLE: &str = env!("CARGO_BIN_EXE_bbcp");

/// A temporary directory with `src`, `dst` and `ckp`. In arguments and paths, `{}` stands for it.
pub(crate) struct Bench {
    directory: TempDir,
}

impl Bench {
    pub(crate) fn new() -> Self {
        let directory = TempDir::new().unwrap();
        for name in ["src", "dst", "ckp"] {
            fs::create_dir(directory.path().join(name)).unwrap();
        }
        Self { directory }
    }

    /// Creates a bench with a source `src/a` of `size` bytes.
    pub(crate) fn with_source(size: usize) -> Self {
        let bench = Self::new();
        bench.write("src/a", &content(size, 1));
        bench
    }

    pub(crate) fn root(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    pub(crate) fn fill(&self, text: &str) -> String {
        text.replace("{}", self.root().to_str().unwrap())
    }

    pub(crate) fn write(&self, name: &str, content: &[u8]) {
        fs::write(self.path(name), content).unwrap();
    }

    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    pub(crate) fn exists(&self, name: &str) -> bool {
        self.path(name).exists()
    }

    pub(crate) fn size(&self, name: &str) -> u64 {
        fs::metadata(self.path(name)).map_or(0, |metadata| metadata.len())
    }

    pub(crate) fn mode(&self, name: &str) -> u32 {
        fs::metadata(self.path(name)).unwrap().permissions().mode() & 0o7777
    }

    /// Prepares a run of the double with these arguments.
    pub(crate) fn call(&self, arguments: &[&str]) -> Call<'_> {
        self.call_program(Path::new(DOUBLE), arguments)
    }

    /// Prepares a run of the double with injections, `-v`, from `src/a` to `dst/x`.
    pub(crate) fn injected(&self, plan: &str) -> Call<'_> {
        self.call(&["-v", "{}/src/a", "{}/dst/x"])
            .knob("PLAN", plan)
    }

    pub(crate) fn call_program(&self, program: &Path, arguments: &[&str]) -> Call<'_> {
        let mut command = Command::new(program);
        command
            .args(arguments.iter().map(|argument| self.fill(argument)))
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap())
            .env("HOME", self.root())
            .env("LC_ALL", "C")
            .env("bbcp_CONFIGFN", "/dev/null")
            .current_dir(self.root())
            .stdin(Stdio::null())
            .process_group(0);
        Call {
            bench: self,
            command,
        }
    }
}

/// A run that has not been started.
pub(crate) struct Call<'a> {
    bench: &'a Bench,
    command: Command,
}

impl<'a> Call<'a> {
    /// Sets `BBCP_DOUBLE_…`.
    pub(crate) fn knob(mut self, name: &str, value: &str) -> Self {
        self.command
            .env(format!("BBCP_DOUBLE_{name}"), self.bench.fill(value));
        self
    }

    pub(crate) fn run(self) -> Outcome {
        self.start().finish()
    }

    pub(crate) fn start(mut self) -> Running<'a> {
        // Files, not pipes: they need no reader, and orphans may keep them open.
        let (out, out_path) = tempfile::NamedTempFile::new_in(self.bench.root())
            .unwrap()
            .keep()
            .unwrap();
        let (err, err_path) = tempfile::NamedTempFile::new_in(self.bench.root())
            .unwrap()
            .keep()
            .unwrap();
        let child = self
            .command
            .stdout::<File>(out)
            .stderr::<File>(err)
            .spawn()
            .unwrap();
        Running {
            bench: self.bench,
            child,
            out_path,
            err_path,
        }
    }
}

/// A started run; dropping it kills its process group.
pub(crate) struct Running<'a> {
    bench: &'a Bench,
    child: Child,
    out_path: PathBuf,
    err_path: PathBuf,
}

impl Running<'_> {
    pub(crate) fn id(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    pub(crate) fn signal_group(&self, signal: nix::sys::signal::Signal) {
        let _ = nix::sys::signal::killpg(nix::unistd::Pid::from_raw(self.id()), signal);
    }

    pub(crate) fn signal_agent(&self, signal: nix::sys::signal::Signal) {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.id()), signal);
    }

    pub(crate) fn ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    pub(crate) fn stderr(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.err_path).unwrap()).into_owned()
    }

    /// Waits until the file has at least `bytes`.
    pub(crate) fn await_size(&mut self, name: &str, bytes: u64) {
        let path = self.bench.path(name);
        eventually(&format!("{bytes} bytes in {name}"), || {
            fs::metadata(&path).is_ok_and(|metadata| metadata.len() >= bytes)
        });
    }

    /// Waits for the end of the run.
    pub(crate) fn finish(mut self) -> Outcome {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > deadline {
                self.signal_group(nix::sys::signal::Signal::SIGKILL);
                panic!(
                    "did not end within {PATIENCE:?}; stderr:\n{}",
                    self.stderr()
                );
            }
            std::thread::sleep(Duration::from_millis(3));
        };
        Outcome {
            code: status.code(),
            signal: status.signal(),
            stdout: String::from_utf8_lossy(&fs::read(&self.out_path).unwrap()).into_owned(),
            stderr_bytes: fs::read(&self.err_path).unwrap(),
        }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if !self.ended() {
            self.signal_group(nix::sys::signal::Signal::SIGKILL);
            let _ = self.child.wait();
        }
    }
}

/// Result of a run.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) code: Option<i32>,
    pub(crate) signal: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr_bytes: Vec<u8>,
}

impl Outcome {
    pub(crate) fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.stderr_bytes).into_owned()
    }

    /// The exit code, or 128 + signal as in a shell.
    pub(crate) fn rc(&self) -> i32 {
        self.code
            .or(self.signal.map(|signal| 128 + signal))
            .unwrap()
    }

    #[track_caller]
    pub(crate) fn expect(&self, code: i32, texts: &[&str]) {
        assert_eq!(self.rc(), code, "{self:?} {}", self.stderr());
        for text in texts {
            assert!(
                self.stderr().contains(text),
                "{text:?} is not in\n{}",
                self.stderr()
            );
        }
    }
}

/// Returns bytes without a pattern, the same for each seed.
pub(crate) fn content(size: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    })
    .flatten()
    .take(size)
    .collect()
}

/// Waits for a condition.
#[track_caller]
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "never came: {what}");
        std::thread::sleep(Duration::from_millis(3));
    }
}

/// Returns true if a process exists and is not a zombie.
pub(crate) fn lives(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        !stat
            .rsplit(')')
            .next()
            .unwrap_or("")
            .trim_start()
            .starts_with(['Z', 'X'])
    })
}

/// Returns process ids and command lines of a process's children.
pub(crate) fn children(parent: i32) -> Vec<(i32, String)> {
    let mut found: Vec<(i32, String)> = fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| status_field(*pid, "PPid:") == Some(parent))
        .map(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let text = String::from_utf8_lossy(&line)
                .trim_end_matches('\0')
                .replace('\0', " ");
            (pid, text)
        })
        .collect();
    found.sort();
    found
}

fn status_field(pid: i32, field: &str) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status
        .lines()
        .find_map(|line| line.strip_prefix(field)?.trim().parse().ok())
}

/// Returns the mode of a finished target.
pub(crate) fn usual_mode() -> u32 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let mask = status
        .lines()
        .find_map(|line| u32::from_str_radix(line.strip_prefix("Umask:")?.trim(), 8).ok())
        .unwrap();
    0o644 & !mask
}
