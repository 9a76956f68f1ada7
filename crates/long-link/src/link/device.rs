//! A TUN device in the network namespace of a host.

use std::fs::File;
use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, BorrowedFd};
use std::process::{Command, Stdio};
use std::thread;

use nix::sched::{CloneFlags, setns};
use nix::unistd::Pid;
use tun_rs::{DeviceBuilder, SyncDevice};

/// Name of the device on each host.
const NAME: &str = "link0";
/// Length of the queue between the host and this program. It is long enough for what a host sends while this program does
/// not run, so that packets are lost on the link and not there.
const QUEUE_PACKETS: u32 = 20_000;

/// Sizes of the largest packet that a host may send, in bytes. The smallest is that of IPv4.
pub(crate) const MTU: RangeInclusive<i64> = 576..=65_535;

/// A TUN device.
pub(crate) struct Device(SyncDevice);

impl Device {
    /// Creates the device in the network namespace of the process `host`, gives it the address, and starts it and the
    /// loopback device.
    ///
    /// # Errors
    /// The device cannot be created, or `ip` refuses a command.
    pub(crate) fn create(host: Pid, address: Ipv4Addr, mtu: u32) -> io::Result<Self> {
        in_network_of(host, || {
            let device = DeviceBuilder::new()
                .name(NAME)
                .tx_queue_len(QUEUE_PACKETS)
                .build_sync()?;
            device.set_nonblocking(true)?;
            ip(&format!(
                "link set lo up\naddress add {address}/24 dev {NAME}\nlink set {NAME} mtu {mtu} up\n"
            ))?;
            Ok(Self(device))
        })
    }

    /// Changes the size of the largest packet that the host sends.
    ///
    /// # Errors
    /// `ip` refuses the size.
    pub(crate) fn set_mtu(host: Pid, mtu: u32) -> io::Result<()> {
        in_network_of(host, || ip(&format!("link set {NAME} mtu {mtu}\n")))
    }

    /// Reads the next packet that the host sends; returns its size.
    ///
    /// # Errors
    /// There is none ([`io::ErrorKind::WouldBlock`]), or the device is gone.
    pub(super) fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.recv(buffer)
    }

    /// Gives a packet to the host.
    ///
    /// # Errors
    /// The host does not accept it, or the device is gone.
    pub(super) fn send(&self, packet: &[u8]) -> io::Result<()> {
        self.0.send(packet).map(drop)
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Runs a function in the network namespace of a process. Descriptors that it opens stay in that namespace.
///
/// # Errors
/// The namespace cannot be entered, or the function's own error.
pub(crate) fn in_network_of<T: Send>(
    host: Pid,
    function: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    let namespace = File::open(format!("/proc/{host}/ns/net"))?;
    // In a thread of its own, because a thread cannot return to another namespace without its descriptor.
    thread::scope(|scope| {
        scope
            .spawn(|| {
                setns(namespace, CloneFlags::CLONE_NEWNET)?;
                function()
            })
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace panicked")))
    })
}

/// Runs commands of `ip` in the namespace of this thread.
fn ip(commands: &str) -> io::Result<()> {
    let mut child = Command::new("ip")
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(commands.as_bytes())?;
    }
    let done = child.wait_with_output()?;
    if done.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&done.stderr);
    Err(io::Error::other(format!("ip: {}", message.trim())))
}
