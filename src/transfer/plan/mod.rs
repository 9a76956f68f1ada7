//! Conversion of a transfer's rows into the plan of a copy, or into the reason to refuse it.
//!
//! Pure: everything that is unsafe or impossible according to the rows is refused here, before any process starts.
//! Facts that only the file systems know (existence, size, free space) are read later, from [`Source`] and [`Target`].

use std::time::Duration;

use entity::StorageType;
use uuid::Uuid;

use self::paths::{SOURCE_LIMIT, TARGET_LIMIT, can_hold_checkpoints, file_path, limit};
use super::digest::{Digest, block_bytes};
use super::endpoint::{
    CopySession, Endpoint, Facts, Host, ReadOptions, Remote, Source, SshConnections, Target,
    TemporaryName, is_login,
};
use super::failures::{Role, TransferError};
use super::link::LinkName;
use crate::settings::{Bbcp, DigestAlgorithm, LinkSettings, Slowness, Ssh};
use crate::transfer::id::{AttemptNumber, TransferId};

mod from_rows;
mod local_host;
mod paths;
mod trial;

pub use from_rows::PlanInput;
pub(super) use from_rows::file_settings;
pub use local_host::LocalHost;
pub(super) use paths::checked_path;

/// The worker's own host, and its connections to others.
#[derive(Debug, Clone)]
pub struct Hosts {
    /// Names of the worker's own host.
    pub local: LocalHost,
    /// Connections to other hosts.
    connections: SshConnections,
}

impl Hosts {
    /// Creates the value for a process on the host `local`, without any connection.
    #[must_use]
    pub fn new(local: LocalHost) -> Self {
        Self {
            local,
            connections: SshConnections::default(),
        }
    }
}

/// The only transfer method of this worker.
const METHOD: &str = "bbcp";

/// A data location, with the columns that a copy needs.
#[derive(Debug, Clone)]
pub struct Location {
    /// Short name of the site.
    pub site: String,
    /// Name of the location.
    pub name: String,
    /// Kind of storage.
    pub storage: StorageType,
    /// Host of the directory; `None` for the worker's own host.
    pub host: Option<String>,
    /// Root directory.
    pub root: String,
}

/// The file to copy.
#[derive(Debug, Clone)]
pub struct Package {
    /// Directory below a location's root, the same at both ends; may be empty. If the path already ends with the file
    /// name, it is the path of the file.
    pub relative_path: String,
    /// Name of the file.
    pub file_name: String,
    /// Size in bytes.
    pub size: u64,
    /// Digest recorded when the package was made, if any.
    pub checksum: Option<String>,
}

/// One attempt at one transfer.
#[derive(Debug, Clone, Copy)]
pub struct Attempt {
    /// Id of the transfer.
    pub transfer_id: TransferId,
    /// Number of the attempt.
    pub number: AttemptNumber,
    /// Token of the attempt's lease.
    pub lease_token: Uuid,
}

/// A copy that can be started.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The attempt that makes the copy.
    pub attempt: Attempt,
    /// The link that the copy uses.
    pub link: LinkName,
    /// The file to read.
    pub source: Source,
    /// Destination of the copy, with its temporary name.
    pub target: Target,
    /// Size in bytes: according to the database, and after the inspection of the origin that of the file.
    pub size: u64,
    /// Digest according to the database; `None` if it is missing or has an unknown form.
    pub recorded: Option<Digest>,
    /// Algorithm by which both ends are compared: that of the recorded digest, or else the link's.
    pub digest: DigestAlgorithm,
    /// Settings of bbcp for this link.
    pub bbcp: Bbcp,
    /// Maximum time without a moved byte before the copy is stopped.
    pub stall_timeout: Duration,
    /// Minimum rate and deadline of the copy.
    pub slowness: Slowness,
    /// Minimum size in bytes of a copy that is kept after a failure, so that the next attempt completes it. With
    /// `None`, no partial copy is kept.
    pub resume_above: Option<u64>,
    /// Maximum size in bytes of a package that is copied through the ssh connection; 0 for none.
    by_ssh_up_to: u64,
    /// Host of the destination as named by its location; empty for the worker's own host.
    destination_host: String,
}

impl Plan {
    /// Options for reading a file of this plan without a copy that runs at the same time.
    pub(super) fn read_options(&self) -> ReadOptions<'static> {
        ReadOptions {
            algorithm: self.digest,
            size: self.size,
            with_blocks: self.compares_blocks(),
            stall_timeout: self.stall_timeout,
            behind: None,
            is_growing: false,
            blocks: None,
        }
    }

    /// Returns true if the two ends are compared block by block: a remote end computes no digest of a whole file that
    /// has several blocks.
    pub(super) fn compares_blocks(&self) -> bool {
        block_bytes(self.size) < self.size && self.remote_end().is_some()
    }

    /// Returns true if the copy is read for its digest while it grows. If both ends are on this host, it is read from the
    /// disk afterwards. An empty copy does not grow, so nothing shows that it exists already.
    pub(super) fn reads_growing_copy(&self) -> bool {
        self.size > 0 && self.remote_end().is_some()
    }

    /// Returns true if the origin must be read to verify the copy. If the package has a recorded checksum, an end that
    /// computes the digest of the whole file suffices.
    pub(super) fn needs_origin_digest(&self) -> bool {
        let has_whole = self.target.endpoint().remote().is_none() || !self.compares_blocks();
        self.recorded.is_none() || !has_whole
    }

    /// Returns true if the package is copied through the ssh connection, without bbcp.
    pub(super) fn is_copied_by_ssh(&self) -> bool {
        self.by_ssh_up_to > 0 && self.size <= self.by_ssh_up_to && self.remote_end().is_some()
    }

    /// Returns true if a partial copy of a failed attempt is kept, so that the next attempt completes it. This is so for
    /// every attempt with the same size, destination and settings. Only bbcp completes partial copies.
    pub fn keeps_partial(&self) -> bool {
        self.resume_above.is_some_and(|least| self.size >= least)
            && !self.is_copied_by_ssh()
            && can_hold_checkpoints(&self.target.checkpoint_path())
    }

    /// Returns true if the blocks of both ends are recorded for the attempt that completes a partial copy.
    pub(super) fn may_record_blocks(&self) -> bool {
        self.keeps_partial() && self.compares_blocks()
    }

    /// Reserves a session of the connection to the remote end, if there is one, for the ssh of this copy.
    ///
    /// # Errors
    /// The remote end could not be reached.
    pub(super) async fn copy_session(&self) -> Result<Option<CopySession>, TransferError> {
        match self.remote_end() {
            Some((role, remote)) => remote.copy_session(role).await.map(Some),
            None => Ok(None),
        }
    }

    /// The remote end with its role, if there is one; at most one end is remote.
    pub(super) fn remote_end(&self) -> Option<(Role, &Remote)> {
        let origin = self.source.endpoint().remote();
        let destination = self.target.endpoint().remote();
        let origin = origin.map(|remote| (Role::Origin, remote));
        origin.or(destination.map(|remote| (Role::Destination, remote)))
    }

    /// Waits until the remote end answers, whatever the answer is, or cannot be reached.
    pub(super) async fn reach_ends(&self) {
        if let Some((_, remote)) = self.remote_end() {
            let _answer = remote.ping().await;
        }
    }

    /// Key that identifies this copy's destination: host and path. `here` is the name of the worker's own host.
    ///
    /// The host is spelled as in its location, so that workers at both ends use the same key. (Two locations that spell
    /// one host in two ways are not recognised as one; an existing file is still never overwritten.)
    pub fn destination_key(&self, here: &str) -> String {
        let host = if self.destination_host.is_empty() {
            here
        } else {
            &self.destination_host
        };
        format!("{}:{}", LocalHost::normalize(host), self.target.path())
    }

    /// Refuses a destination that is the source itself under another path, host name or link. Such a copy would pass
    /// every comparison, and the only copy would be counted as two.
    ///
    /// # Errors
    /// [`TransferError::SamePlace`].
    pub fn refuse_same_file(&self, source: &Facts, existing: &Facts) -> Result<(), TransferError> {
        if source.is_same_file(existing) {
            return Err(self.same_file_error());
        }
        Ok(())
    }

    /// The error for two ends that are the same file.
    pub(super) fn same_file_error(&self) -> TransferError {
        TransferError::SamePlace {
            path: self.source.path().to_string(),
        }
    }
}

/// Makes the plan of one attempt.
///
/// # Errors
/// The first reason why this copy must not be started; always a permanent failure.
pub fn plan(
    attempt: Attempt,
    input: &PlanInput,
    link: &LinkSettings,
    hosts: &Hosts,
) -> Result<Plan, TransferError> {
    let PlanInput {
        origin,
        destination,
        package,
        method,
    } = input;
    check_method(origin, destination, method.as_deref())?;
    let source_endpoint = endpoint(Role::Origin, origin, &link.ssh, hosts)?;
    let target_endpoint = endpoint(Role::Destination, destination, &link.ssh, hosts)?;
    if let (Endpoint::Remote(from), Endpoint::Remote(to)) = (&source_endpoint, &target_endpoint) {
        return Err(TransferError::BothRemote {
            origin_host: from.host.to_string(),
            destination_host: to.host.to_string(),
        });
    }

    let source_path = file_path(Role::Origin, &origin.root, package, SOURCE_LIMIT)?;
    let temporary = TemporaryName::new(attempt.transfer_id, attempt.number, attempt.lease_token);
    let target = self::target(destination, package, &link.ssh, hosts, temporary)?;
    let one_host = matches!(
        (&source_endpoint, &target_endpoint),
        (Endpoint::Local, Endpoint::Local)
    );
    if one_host && source_path == *target.path() {
        return Err(TransferError::SamePlace {
            path: source_path.to_string(),
        });
    }

    limit(Role::Destination, &target.temporary_path(), TARGET_LIMIT)?;
    let recorded = package.checksum.as_deref().and_then(Digest::recorded);
    Ok(Plan {
        attempt,
        link: input.link(),
        source: Source::new(
            source_endpoint,
            checked_path(Role::Origin, &origin.root)?,
            source_path,
        ),
        target,
        size: package.size,
        digest: recorded.as_ref().map_or(link.digest, Digest::algorithm),
        recorded,
        bbcp: link.bbcp.clone(),
        stall_timeout: link.stall_timeout,
        slowness: link.slowness,
        resume_above: link.resume.then_some(link.resume_above),
        by_ssh_up_to: link.ssh.max_package_bytes,
        destination_host: named_host(destination).to_owned(),
    })
}

/// Path of a package at its destination.
///
/// # Errors
/// The location or the path is unsafe or does not belong to a disk.
pub(super) fn target(
    destination: &Location,
    package: &Package,
    ssh: &Ssh,
    hosts: &Hosts,
    temporary: TemporaryName,
) -> Result<Target, TransferError> {
    let path = file_path(Role::Destination, &destination.root, package, TARGET_LIMIT)?;
    Ok(Target::new(
        endpoint(Role::Destination, destination, ssh, hosts)?,
        checked_path(Role::Destination, &destination.root)?,
        path,
        temporary,
    ))
}

fn check_method(
    origin: &Location,
    destination: &Location,
    method: Option<&str>,
) -> Result<(), TransferError> {
    let (origin, destination) = (origin.site.clone(), destination.site.clone());
    match method {
        None => Err(TransferError::NoRoute {
            origin,
            destination,
        }),
        Some(method) if !method.trim().eq_ignore_ascii_case(METHOD) => {
            Err(TransferError::OtherMethod {
                origin,
                destination,
                method: method.into(),
            })
        }
        Some(_) => Ok(()),
    }
}

/// Host named by a location; empty for no host and for `localhost`.
fn named_host(location: &Location) -> &str {
    let host = location.host.as_deref().map(str::trim).unwrap_or_default();
    if host.eq_ignore_ascii_case("localhost") {
        ""
    } else {
        host
    }
}

pub(super) fn endpoint(
    role: Role,
    location: &Location,
    ssh: &Ssh,
    hosts: &Hosts,
) -> Result<Endpoint, TransferError> {
    let unsupported = match location.storage {
        StorageType::Disk => None,
        StorageType::S3 => Some("S3"),
        StorageType::Tape => Some("tape"),
    };
    if let Some(kind) = unsupported {
        return Err(TransferError::UnsupportedLocation {
            role,
            location: location.name.clone(),
            kind: kind.into(),
        });
    }
    let host = named_host(location);
    if host.is_empty() || hosts.local.has_name(host) {
        return Ok(Endpoint::Local);
    }
    let host = Host::new(host).map_err(|problem| TransferError::BadHost {
        role,
        location: location.name.clone(),
        host: host.into(),
        problem,
    })?;
    if !ssh.user.is_empty() && !is_login(&ssh.user) {
        return Err(TransferError::BadUser {
            role,
            location: location.name.clone(),
            user: ssh.user.clone(),
        });
    }
    let remote = Remote::new(host, ssh, &hosts.connections);
    Ok(Endpoint::Remote(remote))
}

/// Plans for the tests of this crate.
#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
pub(super) mod examples {
    use super::*;

    pub(in crate::transfer) fn attempt() -> Attempt {
        Attempt {
            transfer_id: TransferId::new(42),
            number: AttemptNumber::new(2),
            lease_token: Uuid::from_u128(0xdead_beef_u128 << 96),
        }
    }

    pub(in crate::transfer) fn location(site: &str, host: &str, root: &str) -> Location {
        Location {
            site: site.into(),
            name: "buffer".into(),
            storage: StorageType::Disk,
            host: Some(host.into()),
            root: root.into(),
        }
    }

    pub(in crate::transfer) fn package(relative_path: &str, file_name: &str) -> Package {
        Package {
            relative_path: relative_path.into(),
            file_name: file_name.into(),
            size: 1000,
            checksum: None,
        }
    }

    pub(in crate::transfer) fn link() -> LinkSettings {
        let settings = crate::settings::load(None, []).unwrap();
        settings.link("ccat", "cologne").unwrap()
    }

    pub(in crate::transfer) fn input(
        from: &Location,
        to: &Location,
        package: &Package,
    ) -> PlanInput {
        PlanInput {
            origin: from.clone(),
            destination: to.clone(),
            package: package.clone(),
            method: Some("bbcp".into()),
        }
    }

    /// Plan from `from` to `to` with `link`; "here" is this host.
    pub(in crate::transfer) fn between(
        from: &Location,
        to: &Location,
        package: &Package,
        link: &LinkSettings,
    ) -> Result<Plan, TransferError> {
        let hosts = Hosts::new(LocalHost::new("here", []));
        plan(attempt(), &input(from, to, package), link, &hosts)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::examples::{between, link, location, package};
    use super::*;

    fn push(package: &Package) -> Result<Plan, TransferError> {
        let from = location("ccat", "here", "/data/fyst/");
        let to = location("cologne", "far.example.org", "/archive");
        between(&from, &to, package, &link())
    }

    #[test]
    fn a_push() {
        let plan = push(&package("2026/11", "p.tar")).unwrap();
        assert_eq!(plan.source.path().as_str(), "/data/fyst/2026/11/p.tar");
        assert!(plan.source.endpoint().remote().is_none());
        assert_eq!(plan.target.path().as_str(), "/archive/2026/11/p.tar");
        assert_eq!(
            plan.target.temporary_path().as_str(),
            "/archive/2026/11/.ccat-transfer-42-2-deadbeef.part"
        );
        let remote = plan.target.endpoint().remote().unwrap();
        assert_eq!(remote.host.as_ssh(), "far.example.org");
        assert_eq!(plan.target.growing_path(), None);
    }

    #[rstest]
    #[case::directory("a/b", "f", "/archive/a/b/f")]
    #[case::none("", "f", "/archive/f")]
    #[case::dot(".", "f", "/archive/f")]
    #[case::whole_path("a/f", "f", "/archive/a/f")]
    #[case::slashes("a//b/", "f", "/archive/a/b/f")]
    #[case::odd_names("-a:b@c", "-f:x@y", "/archive/-a:b@c/-f:x@y")]
    fn target_paths(#[case] relative: &str, #[case] name: &str, #[case] path: &str) {
        let plan = push(&package(relative, name)).unwrap();
        assert_eq!(plan.target.path().as_str(), path);
    }

    #[rstest]
    #[case("..", "f")]
    #[case("a/../../etc", "f")]
    #[case("/etc", "f")]
    #[case("a", "")]
    #[case("a", ".")]
    #[case("a", "..")]
    #[case("a", "b/f")]
    #[case("a\nb", "f")]
    #[case("a", "f\t")]
    #[case("a", ".ccat-transfer-1-1-00000000.part")]
    #[case("a", &"x".repeat(256))]
    #[case(&"0123456789/".repeat(100), "f")]
    fn unsafe_paths(#[case] relative: &str, #[case] name: &str) {
        let error = push(&package(relative, name)).unwrap_err();
        assert_eq!(error.code(), "path_invalid", "{error}");
    }

    #[test]
    fn the_longest_name_still_has_a_temporary() {
        let plan = push(&package("a", &"x".repeat(255))).unwrap();
        assert!(plan.target.temporary_path().file_name().unwrap().len() <= 255);
    }

    #[rstest]
    #[case::same(("here", "/a"), ("HERE.", "/a/"), "same_place")]
    #[case::both_remote(("x", "/a"), ("y", "/b"), "both_ends_remote")]
    #[case::option(("here", "/a"), ("-oProxyCommand=id", "/b"), "host_invalid")]
    #[case::login_in_host(("root@x", "/a"), ("here", "/b"), "host_invalid")]
    #[case::relative_root(("here", "data"), ("x", "/b"), "path_invalid")]
    fn refused(#[case] from: (&str, &str), #[case] to: (&str, &str), #[case] code: &str) {
        let from = location("ccat", from.0, from.1);
        let to = location("cologne", to.0, to.1);
        let error = between(&from, &to, &package("", "f"), &link()).unwrap_err();
        assert_eq!(error.code(), code, "{error}");
    }

    #[test]
    fn other_storage() {
        let from = location("ccat", "here", "/a");
        let mut to = location("cologne", "here", "/b");
        to.storage = StorageType::Tape;
        let error = between(&from, &to, &package("", "f"), &link()).unwrap_err();
        assert_eq!(error.code(), "location_unsupported");
        assert_eq!(error.scope(), crate::transfer::failures::Scope::Destination);
    }

    #[rstest]
    #[case(None, "route_missing")]
    #[case(Some("rsync"), "route_method")]
    fn methods(#[case] method: Option<&str>, #[case] code: &str) {
        let (from, to) = (location("a", "here", "/a"), location("b", "here", "/b"));
        let input = PlanInput {
            method: method.map(str::to_owned),
            ..examples::input(&from, &to, &package("", "f"))
        };
        let hosts = Hosts::new(LocalHost::new("here", []));
        let error = plan(examples::attempt(), &input, &link(), &hosts).unwrap_err();
        assert_eq!(error.code(), code);
    }

    #[test]
    fn a_bad_login() {
        let mut link = link();
        link.ssh.user = "-oProxyCommand=id".into();
        let (from, to) = (location("a", "here", "/a"), location("b", "x", "/b"));
        let error = between(&from, &to, &package("", "f"), &link).unwrap_err();
        assert_eq!(error.code(), "user_invalid");
    }

    proptest! {
        #[test]
        fn no_path_leaves_its_location(relative in "\\PC{0,40}", name in "\\PC{0,40}") {
            if let Ok(plan) = push(&package(&relative, &name)) {
                prop_assert!(plan.source.path().as_str().starts_with("/data/fyst/"));
                prop_assert!(plan.target.path().as_str().starts_with("/archive/"));
                prop_assert_eq!(plan.target.path().file_name(), Some(name.as_str()));
                prop_assert_eq!(plan.target.path().parent(), plan.target.temporary_path().parent());
                prop_assert_ne!(plan.target.path(), &plan.target.temporary_path());
            }
        }
    }
}
