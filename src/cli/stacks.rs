//! Threads with stacks that no message can exhaust.
//!
//! The AMQP library reads a message's headers by recursion and without a limit, on a thread of its own whose
//! stack cannot be asked for. Headers that nest some 1500 deep, 10 KB of them, overflow the usual 2 MiB; the process is then
//! gone, the message goes back to the queue, and takes the next worker. Only RabbitMQ's frames (128 KiB) limit the depth, to
//! 26,000. Rust takes the size of stacks from the environment, once, before the first thread; a program cannot
//! change its own environment safely, but it can start itself anew. Memory is used only as far as a stack
//! ever grows.

use std::env;
use std::os::unix::process::CommandExt;
use std::process::Command;

const VARIABLE: &str = "RUST_MIN_STACK";

/// Bytes of a stack: twice what the deepest headers that fit into a frame were seen to need.
const SIZE: usize = if cfg!(debug_assertions) {
    512 << 20
} else {
    128 << 20
};

/// Starts the program anew, in the same process and with deeper stacks, unless the environment sets
/// their size already. Returns where that is so, and where it cannot be done.
pub(super) fn deepen() {
    if env::var_os(VARIABLE).is_some() {
        return;
    }
    let Ok(program) = env::current_exe() else {
        return;
    };
    let mut arguments = env::args_os();
    let mut again = Command::new(program);
    if let Some(name) = arguments.next() {
        again.arg0(name);
    }
    // Comes back only if it fails: the program then goes on with the stacks that it has.
    let _ = again.args(arguments).env(VARIABLE, SIZE.to_string()).exec();
}
