//! Supervision of processes: children that check that their agent lives, and injected ends.

use crate::wire::{Agent, Job};
use nix::sys::resource::{Resource, UsageWho, getrusage, setrlimit};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::time::TimeValLike;
use nix::unistd::{Pid, getpid, getppid};
use std::io::Read;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Exit code of a child whose agent has ended.
pub(crate) const AGENT_IS_GONE: u8 = 8;

/// The standard input of this child has ended, so its agent has.
static INPUT_HAS_ENDED: AtomicBool = AtomicBool::new(false);

/// Starts the check of the agent in a child. When the agent is gone, `last_act` runs and the process ends.
pub(crate) fn watch_agent(job: &Job, last_act: impl FnOnce() + Send + 'static) {
    let agent = job.agent;
    let poll = Duration::from_secs_f64(job.poll);
    std::thread::spawn(move || {
        while agent_lives(agent) {
            std::thread::sleep(poll);
        }
        last_act();
        std::process::exit(i32::from(AGENT_IS_GONE));
    });
}

/// Returns true if the agent lives.
pub(crate) fn agent_lives(agent: Agent) -> bool {
    match agent {
        Agent::Parent(agent) => getppid() == Pid::from_raw(agent),
        Agent::Connected => !INPUT_HAS_ENDED.load(Ordering::Relaxed),
    }
}

/// Starts to read standard input after the job, if this is how the child detects the end of its agent.
pub(crate) fn watch_input(job: &Job) {
    if job.agent == Agent::Connected {
        std::thread::spawn(|| {
            // The agent sends nothing more.
            let _ = std::io::stdin().read(&mut [0]);
            INPUT_HAS_ENDED.store(true, Ordering::Relaxed);
        });
    }
}

/// Blocks SIGTERM for this process. The signal is blocked rather than ignored, since that needs no unsafe code;
/// other processes see no difference.
pub(crate) fn block_sigterm() {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    let _ = signals.thread_block();
}

/// Ends this process by a signal, without a core file.
pub(crate) fn end_by_signal(signal: i32) -> ! {
    let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
    let signal = Signal::try_from(signal).unwrap_or(Signal::SIGKILL);
    loop {
        // Repeated: Rust's own handler for SIGSEGV handles the first signal and then removes itself.
        let _ = kill(getpid(), signal);
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Formats the line `Source cpu=… (sys=… usr=…).`
pub(crate) fn cpu_line(who: &str) -> String {
    let (system, user) = getrusage(UsageWho::RUSAGE_SELF).map_or((0.0, 0.0), |usage| {
        let seconds = |time: nix::sys::time::TimeVal| time.num_milliseconds() as f64 / 1e3;
        (seconds(usage.system_time()), seconds(usage.user_time()))
    });
    format!(
        "{who} cpu={:.3} (sys={system:.3} usr={user:.3}).",
        system + user
    )
}
