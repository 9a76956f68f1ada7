//! Blocks of both ends that are read while a copy runs: counted when their digests agree, and recorded, so that the attempt
//! that completes a partial copy does not read them again.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use entity::FileEnd;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use super::AttemptRun;
use super::prepare::Prepared;
use crate::transfer::digest::{BlockCount, Digest, KnownBlocks, ReadBlock, block_bytes};
use crate::transfer::endpoint::{AbsolutePath, BlockSender, Blocks, Endpoint, Facts};
use crate::transfer::lease::{Lease, LeaseError, Snapshot};
use crate::transfer::plan::Plan;
use crate::transfer::repository::Repository;
use service_connection::error_chain::chain;

/// Time limit for recording the last blocks of a failed copy.
const RECORDING_LIMIT: Duration = Duration::from_secs(2);

/// Blocks of both ends that an earlier attempt has read.
#[derive(Debug, Default)]
pub(super) struct KnownEnds {
    origin: KnownBlocks,
    destination: KnownBlocks,
}

impl KnownEnds {
    fn of(&self, end: FileEnd) -> &KnownBlocks {
        match end {
            FileEnd::Origin => &self.origin,
            FileEnd::Destination => &self.destination,
        }
    }
}

/// Receives the blocks of both ends.
pub(super) struct BlockRecorder {
    channel: mpsc::UnboundedSender<(FileEnd, ReadBlock)>,
    known: KnownEnds,
    recording: AbortOnDropHandle<()>,
}

impl BlockRecorder {
    /// The blocks of one end.
    pub(super) fn blocks(&self, end: FileEnd) -> Blocks {
        Blocks {
            known: self.known.of(end).clone(),
            read: BlockSender {
                end,
                channel: self.channel.clone(),
            },
        }
    }

    /// Waits until the blocks of a copy that has ended are recorded, for at most [`RECORDING_LIMIT`].
    pub(super) async fn finish(self) {
        drop(self.channel);
        // A block that is not recorded is read again.
        let _ = timeout(RECORDING_LIMIT, self.recording).await;
    }
}

impl AttemptRun<'_> {
    /// Returns the blocks that an earlier attempt has read, and that are blocks of this origin and of the partial copy
    /// `copy`, which has `bytes` bytes.
    pub(super) async fn known_blocks(
        &self,
        prepared: &Prepared,
        copy: &Facts,
        bytes: u64,
    ) -> KnownEnds {
        let (id, plan) = (self.request.id, &prepared.plan);
        if !plan.may_record_blocks() {
            return KnownEnds::default();
        }
        let recorded = match self.service.repository().recorded_blocks(id).await {
            Ok(recorded) => recorded,
            Err(error) => {
                tracing::warn!(
                    data_transfer_id = id.get(),
                    attempt = self.lease.attempt().get(),
                    error = %chain(&error),
                    "digests of the partial copy could not be read from the database; computing them again"
                );
                return KnownEnds::default();
            }
        };
        let here = &self.service.owner().host;
        let known = |end, version: Option<String>, bytes: u64| {
            let of_file = recorded
                .iter()
                .filter(|row| row.end == end && Some(&row.version) == version.as_ref());
            let count = bytes / block_bytes(plan.size);
            KnownBlocks::first(plan.digest, count, of_file.map(|row| row.block.clone()))
        };
        let ends = KnownEnds {
            origin: known(
                FileEnd::Origin,
                origin_version(plan, &prepared.source, here),
                plan.size,
            ),
            destination: known(FileEnd::Destination, copy_version(plan, copy, here), bytes),
        };
        // Later blocks are of bytes that are copied again.
        let [of_origin, of_destination] =
            [&ends.origin, &ends.destination].map(|end| end.digests.len() as u64);
        if recorded.len() as u64 > of_origin + of_destination {
            let repository = self.service.repository();
            let cut = repository.forget_blocks(id, of_origin, of_destination);
            self.has_old_blocks
                .store(cut.await.is_err(), Ordering::Relaxed);
        }
        ends
    }

    /// Deletes the record of blocks of a partial copy that no longer exists.
    pub(super) async fn forget_blocks(&self, plan: &Plan) {
        if plan.may_record_blocks() {
            let is_gone = self.service.forget_blocks(self.request.id).await;
            self.has_old_blocks.store(!is_gone, Ordering::Relaxed);
        }
    }

    /// Starts to receive the blocks of both ends.
    pub(super) fn record_blocks(&self, prepared: &Prepared, known: KnownEnds) -> BlockRecorder {
        let plan = &prepared.plan;
        let repository = self.service.repository();
        let here = self.service.owner().host.clone();
        let is_recorded = plan.may_record_blocks()
            && repository.has_digests()
            && !self.has_old_blocks.load(Ordering::Relaxed);
        self.verified.store(0, Ordering::Relaxed);
        let mut recording = Recording {
            origin_version: origin_version(plan, &prepared.source, &here),
            count: BlockCount::new(plan.size),
            verified: self.verified.clone(),
            snapshots: self.request.snapshots.clone(),
            record: is_recorded.then(|| Record {
                repository: repository.clone(),
                lease: self.lease.clone(),
                plan: plan.clone(),
                here,
            }),
            copy_version: None,
            unwritten: VecDeque::new(),
        };
        for end in [FileEnd::Origin, FileEnd::Destination] {
            for (index, digest) in (0..).zip(&known.of(end).digests) {
                recording.count(end, index, digest.clone());
            }
        }
        let (channel, blocks) = mpsc::unbounded_channel();
        BlockRecorder {
            channel,
            known,
            recording: AbortOnDropHandle::new(tokio::spawn(recording.run(blocks))),
        }
    }
}

/// Task that receives blocks.
struct Recording {
    count: BlockCount,
    /// Number of verified bytes.
    verified: Arc<AtomicU64>,
    snapshots: watch::Sender<Snapshot>,
    /// `None` if the blocks are not recorded.
    record: Option<Record>,
    /// Version of the origin; `None` if it is unknown.
    origin_version: Option<String>,
    /// Version of the copy, once its host was asked; `None` in it if the host does not provide the needed facts.
    copy_version: Option<Option<String>>,
    /// Blocks that are not recorded yet.
    unwritten: VecDeque<(FileEnd, ReadBlock)>,
}

/// Place of the record of blocks.
struct Record {
    repository: Repository,
    lease: Lease,
    plan: Plan,
    /// Name of this host.
    here: String,
}

impl Recording {
    async fn run(mut self, mut blocks: mpsc::UnboundedReceiver<(FileEnd, ReadBlock)>) {
        while let Some((end, block)) = blocks.recv().await {
            self.count(end, block.index, block.digest.clone());
            self.unwritten.push_back((end, block));
            self.write().await;
        }
        self.write().await;
    }

    fn count(&mut self, end: FileEnd, index: u64, digest: Digest) {
        if self.count.add(end, index, digest) {
            let bytes = self.count.verified_bytes();
            self.verified.store(bytes, Ordering::Relaxed);
            self.snapshots
                .send_modify(|snapshot| snapshot.progress.bytes_verified = bytes);
        }
    }

    /// Records the blocks that are not recorded yet. After a failure of the database, the next call tries again.
    async fn write(&mut self) {
        let Some(record) = &self.record else {
            return self.unwritten.clear();
        };
        while let Some((end, block)) = self.unwritten.front() {
            if *end == FileEnd::Destination && self.copy_version.is_none() {
                // After a failure the next block tries again.
                let Ok(Some(facts)) = record.plan.target.inspect_temporary().await else {
                    return;
                };
                self.copy_version = Some(copy_version(&record.plan, &facts, &record.here));
            }
            let version = match end {
                FileEnd::Origin => self.origin_version.as_ref(),
                FileEnd::Destination => self.copy_version.as_ref().and_then(Option::as_ref),
            };
            if let Some(version) = version {
                let recorded = record
                    .repository
                    .record_block(&record.lease, *end, version, block);
                match recorded.await {
                    Ok(()) => {}
                    Err(LeaseError::Lost) => {
                        self.record = None;
                        return self.unwritten.clear();
                    }
                    Err(LeaseError::Database(error)) => {
                        return tracing::debug!(
                            data_transfer_id = record.lease.data_transfer_id().get(),
                            error = %chain(&error),
                            "digest of a block not recorded yet"
                        );
                    }
                }
            }
            self.unwritten.pop_front();
        }
    }
}

/// Identifies the content of an origin for as long as it does not change. `None` if the host does not provide the needed
/// facts. `here` is the name of this host.
fn origin_version(plan: &Plan, facts: &Facts, here: &str) -> Option<String> {
    let modified = facts.modified?;
    let state = format!(
        "changed at {}.{:09}",
        modified.seconds, modified.nanoseconds
    );
    let place = (plan.source.endpoint(), plan.source.path());
    version(plan, place, facts, here, &state)
}

/// Identifies the partial copy of a plan, whatever its name is. The boot of its host is a part of it, since bytes that were
/// read from memory may not be on the disk after a power failure.
fn copy_version(plan: &Plan, facts: &Facts, here: &str) -> Option<String> {
    let state = format!("boot {}", facts.boot?);
    let place = (plan.target.endpoint(), plan.target.path());
    version(plan, place, facts, here, &state)
}

fn version(
    plan: &Plan,
    (endpoint, path): (&Endpoint, &AbsolutePath),
    facts: &Facts,
    here: &str,
    state: &str,
) -> Option<String> {
    let (device, inode) = facts.identity?;
    let host = endpoint
        .remote()
        .map_or_else(|| here.to_owned(), |remote| remote.host.to_string());
    let (bytes, block) = (plan.size, block_bytes(plan.size));
    Some(format!(
        "{host}:{path}, {bytes} bytes in blocks of {block}, form {RECORD_FORM}, \
         device {device} inode {inode}, {state}"
    ))
}

/// Number of the form in which blocks and states are recorded; to be changed with another major version of `sha2` or
/// `md-5`, whose states may have another form.
const RECORD_FORM: u32 = 1;
