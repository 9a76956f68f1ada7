//! Fault points: named steps in a transfer's life at which a test can kill the process, or make a step fail, stop or
//! repeat.
//!
//! They exist only with the feature `fault-points`, which no release can have. Without it, [`fault_point!`] is only the
//! step that it wraps, and the program contains none of the names.
//!
//! A step is wrapped at its call, `fault_point!(Renamed, target.publish().await)?`. The fault happens **after** the
//! step has had its effect. This is the worst moment: the work is done, and no other process knows it. A process that
//! dies before a step is the same as one that dies after the previous step.
//!
//! `CCAT_TRANSFER_FAULT` lists the faults of this process, separated by commas: `POINT:MODE[:N]` happens the N-th time
//! (from 1) that the point is reached, and only then.
//!
//! | mode | effect |
//! | --- | --- |
//! | `kill` | SIGKILL to this process |
//! | `fail` | the step returns its infrastructure error, and its own result is lost |
//! | `twice` | the step is made again, at once |
//! | `pause` | SIGSTOP to this process; it continues after SIGCONT as if it had never stopped |
//!
//! [`hang_point!`] makes a loop hang: `sweeper:hang`, `manager_loop:hang`. The worker has steps of its own, see
//! `celery_worker::fault_injection`: `queue_consumer:panic`, `subscription:panic`.
//!
//! A test that runs in the same process sets faults for one call with `with_faults`.

#[cfg(all(feature = "fault-points", not(debug_assertions)))]
compile_error!("fault points are for tests: a build without debug assertions must not have them");

/// Marks a step, or (without one) a moment between two steps; see [the module](self).
#[cfg(not(feature = "fault-points"))]
macro_rules! fault_point {
    ($point:ident, $step:expr) => {
        $step
    };
    ($point:ident) => {};
}

/// Marks a step, or (without one) a moment between two steps; see [the module](self).
#[cfg(feature = "fault-points")]
macro_rules! fault_point {
    ($point:ident, $step:expr) => {{
        let done = $step;
        match $crate::faults::FaultPoint::$point.reached() {
            None => done,
            Some($crate::faults::Fault::Fail(lost)) => {
                $crate::faults::lose(done);
                Err(lost.into())
            }
            Some($crate::faults::Fault::Twice) => {
                $crate::faults::lose(done);
                $step
            }
        }
    }};
    ($point:ident) => {
        let _nothing_to_repeat = $crate::faults::FaultPoint::$point.reached();
    };
}

/// Marks a loop that can be made to hang here forever.
#[cfg(not(feature = "fault-points"))]
macro_rules! hang_point {
    ($point:ident) => {};
}

/// Marks a loop that can be made to hang here forever.
#[cfg(feature = "fault-points")]
macro_rules! hang_point {
    ($point:ident) => {
        if $crate::faults::FaultPoint::$point.hangs() {
            std::future::pending::<()>().await;
        }
    };
}

pub(crate) use {fault_point, hang_point};

#[cfg(feature = "fault-points")]
pub use points::*;

#[cfg(feature = "fault-points")]
mod points {
    use std::cell::RefCell;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU32, Ordering};

    use nix::sys::signal::{Signal, raise};

    /// Kind of a fault.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub enum Mode {
        /// The process dies.
        Kill,
        /// The result of the step is lost.
        Fail,
        /// The step is repeated.
        Twice,
        /// The process stops until it receives SIGCONT.
        Pause,
        /// A loop hangs forever.
        Hang,
        /// A loop panics.
        Panic,
    }

    impl Mode {
        /// Name in `CCAT_TRANSFER_FAULT`.
        #[must_use]
        pub fn name(self) -> &'static str {
            match self {
                Self::Kill => "kill",
                Self::Fail => "fail",
                Self::Twice => "twice",
                Self::Pause => "pause",
                Self::Hang => "hang",
                Self::Panic => "panic",
            }
        }
    }

    /// Faults of steps that can be repeated.
    const STEP: &[Mode] = &[Mode::Kill, Mode::Fail, Mode::Twice, Mode::Pause];
    /// Faults of steps that are not repeated but can fail.
    const PASSAGE: &[Mode] = &[Mode::Kill, Mode::Fail, Mode::Pause];
    /// Faults of moments at which nothing can fail.
    const MOMENT: &[Mode] = &[Mode::Kill, Mode::Pause];
    /// Faults of loops.
    const LOOP: &[Mode] = &[Mode::Hang];
    /// Faults of the loops of a consumer.
    const CONSUMER: &[Mode] = &[Mode::Panic];

    macro_rules! points {
        ($($(#[$doc:meta])* $point:ident = $name:literal, $modes:ident;)*) => {
            /// A step at which a fault can be injected.
            #[derive(Debug, Clone, Copy, PartialEq, Eq)]
            pub enum FaultPoint {
                $($(#[$doc])* $point,)*
            }

            impl FaultPoint {
                /// All points: first the steps in the order of a transfer's life, then the loops.
                pub const ALL: &[Self] = &[$(Self::$point),*];

                /// Name in `CCAT_TRANSFER_FAULT`.
                #[must_use]
                pub fn name(self) -> &'static str {
                    match self { $(Self::$point => $name),* }
                }

                /// Possible faults of this point.
                #[must_use]
                pub fn modes(self) -> &'static [Mode] {
                    match self { $(Self::$point => $modes),* }
                }
            }
        };
    }

    points! {
        /// The manager has written SCHEDULED, but not committed it.
        ManagerRowLocked = "manager_row_locked", STEP;
        /// The broker has the manager's message, but SCHEDULED is not committed.
        ManagerPublished = "manager_published", STEP;
        /// SCHEDULED is committed.
        ManagerCommitted = "manager_committed", STEP;
        /// A sweep has written the new state for an expired lease, but not committed it.
        SweepWritten = "sweep_written", STEP;
        /// A sweep has committed the new state.
        SweepCommitted = "sweep_committed", STEP;

        /// The worker has accepted a message.
        TaskAccepted = "task_accepted", MOMENT;
        /// The worker has taken the lease.
        LeaseTaken = "lease_taken", STEP;
        /// The worker has read the rows for the plan.
        PlanRead = "plan_read", STEP;
        /// The destination is claimed: no other transfer can copy to it.
        Claimed = "claimed", STEP;
        /// Both ends have been inspected, and the directory is made.
        Prepared = "prepared", STEP;
        /// Files of dead attempts have been removed.
        LeftoversSwept = "leftovers_swept", MOMENT;
        /// The marker is made that shows whether both ends are one directory.
        MarkerMade = "marker_made", MOMENT;
        /// The database has the names of the attempt's files, but no file exists yet.
        FilesRecorded = "files_recorded", STEP;
        /// An earlier attempt's partial copy has this attempt's name.
        PartialBegun = "partial_begun", STEP;
        /// bbcp has been started.
        CopySpawned = "copy_spawned", PASSAGE;
        /// The first progress of the copy has been observed.
        FirstProgress = "first_progress", PASSAGE;
        /// bbcp has ended with exit code 0.
        CopyEnded = "copy_ended", STEP;
        /// The origin's digest is known.
        OriginDigested = "origin_digested", PASSAGE;
        /// The copy's digest is known.
        DestinationDigested = "destination_digested", STEP;
        /// The copy is verified.
        Verified = "verified", PASSAGE;
        /// The database has confirmed the lease; the rename comes next.
        LeaseConfirmed = "lease_confirmed", STEP;
        /// The copy has its final name, and the row is still IN_PROGRESS.
        Renamed = "renamed", STEP;
        /// The end of an attempt is written, but not committed.
        SettlementWritten = "settlement_written", STEP;
        /// COMPLETED is committed.
        Completed = "completed", STEP;
        /// The task is done, but has no result.
        TaskDone = "task_done", MOMENT;
        /// The result is stored, but the message is not acknowledged.
        ResultStored = "result_stored", STEP;
        /// The message is acknowledged.
        Acknowledged = "acknowledged", MOMENT;

        /// A failed attempt's temporary file has been removed.
        Tidied = "tidied", MOMENT;
        /// The earlier failures have been counted; this one is in no row yet.
        FailureCounted = "failure_counted", STEP;
        /// PENDING with an increased retry count is committed.
        RetryWritten = "retry_written", STEP;
        /// FAILED is committed.
        FailureWritten = "failure_written", STEP;
        /// A transfer that could not start has been postponed.
        Postponed = "postponed", STEP;
        /// The row of a stopped transfer has been released.
        Released = "released", STEP;

        /// The loop that sweeps expired leases.
        Sweeper = "sweeper", LOOP;
        /// The loop of the manager.
        ManagerLoop = "manager_loop", LOOP;
        /// The loop that passes on the deliveries of one queue.
        QueueConsumer = "queue_consumer", CONSUMER;
        /// The loop that maintains a subscription.
        Subscription = "subscription", CONSUMER;
    }

    /// The lost result of a step. Every error type of a step can be made from it, as the error that its infrastructure
    /// gives.
    #[derive(Debug, thiserror::Error)]
    #[error("fault injected at `{}`", .0.name())]
    pub struct AnswerLost(pub FaultPoint);

    /// Instruction to a step.
    #[derive(Debug)]
    pub enum Fault {
        /// Return this error.
        Fail(AnswerLost),
        /// Repeat the step.
        Twice,
    }

    impl FaultPoint {
        /// Called whenever the point is reached. Kills or stops the process here if that is the fault.
        #[must_use]
        pub fn reached(self) -> Option<Fault> {
            match self.due()? {
                Mode::Kill => signal_self(Signal::SIGKILL),
                Mode::Pause => signal_self(Signal::SIGSTOP),
                Mode::Fail => Some(Fault::Fail(AnswerLost(self))),
                Mode::Twice => Some(Fault::Twice),
                // These are faults of loops, not of steps.
                Mode::Hang | Mode::Panic => None,
            }
        }

        /// Returns true if the loop has to hang. Called in every round of a loop.
        #[must_use]
        pub fn hangs(self) -> bool {
            self.due() == Some(Mode::Hang)
        }

        /// Returns true if the loop has to panic. Called in every round of a loop.
        #[must_use]
        pub fn panics(self) -> bool {
            self.due() == Some(Mode::Panic)
        }

        /// Returns true for a loop, false for a step.
        #[must_use]
        pub fn is_loop(self) -> bool {
            [LOOP, CONSUMER].contains(&self.modes())
        }

        /// Returns the fault that is due now, if any.
        fn due(self) -> Option<Mode> {
            if let Some(mode) = take_planned(self) {
                return Some(mode);
            }
            let order = orders().iter().find(|order| order.point == self)?;
            if order.countdown.fetch_sub(1, Ordering::Relaxed) != 1 {
                return None;
            }
            tracing::warn!(
                point = self.name(),
                mode = order.mode.name(),
                "fault injected"
            );
            Some(order.mode)
        }
    }

    /// Makes the worker ask this module for faults of its own steps.
    pub fn install_in_worker() {
        celery_worker::fault_injection::install(|step| {
            use celery_worker::fault_injection::{AnswerLost, Fault, Step};
            let point = match step {
                Step::TaskAccepted => FaultPoint::TaskAccepted,
                Step::ResultStored => FaultPoint::ResultStored,
                Step::Acknowledged => FaultPoint::Acknowledged,
                Step::QueueConsumer => FaultPoint::QueueConsumer,
                Step::Subscription => FaultPoint::Subscription,
            };
            if point.is_loop() {
                return point.panics().then_some(Fault::Panic);
            }
            Some(match point.reached()? {
                super::Fault::Fail(_) => Fault::Fail(AnswerLost(point.name())),
                super::Fault::Twice => Fault::Repeat,
            })
        });
    }

    tokio::task_local! {
        static PLANNED: RefCell<Vec<(FaultPoint, Mode)>>;
    }

    /// Runs `work` with faults for this call only. Each happens once, when its point is next reached in the same task.
    pub async fn with_faults<T>(
        faults: impl IntoIterator<Item = (FaultPoint, Mode)>,
        work: impl Future<Output = T>,
    ) -> T {
        let faults = RefCell::new(faults.into_iter().collect());
        PLANNED.scope(faults, work).await
    }

    fn take_planned(point: FaultPoint) -> Option<Mode> {
        let take = |planned: &RefCell<Vec<(FaultPoint, Mode)>>| {
            let mut planned = planned.borrow_mut();
            let index = planned.iter().position(|(at, _)| *at == point)?;
            Some(planned.remove(index).1)
        };
        PLANNED.try_with(take).ok().flatten()
    }

    /// Drops the result of a step; a transaction in it is rolled back.
    pub fn lose<T>(_answer: T) {}

    /// Sends a signal to the calling thread, so that the thread executes no further instruction before the signal takes
    /// effect.
    fn signal_self(signal: Signal) -> Option<Fault> {
        if let Err(error) = raise(signal) {
            tracing::error!(%error, "fault could not be injected");
        }
        None
    }

    struct Order {
        point: FaultPoint,
        mode: Mode,
        countdown: AtomicU32,
    }

    fn orders() -> &'static [Order] {
        static ORDERS: OnceLock<Vec<Order>> = OnceLock::new();
        ORDERS.get_or_init(|| {
            let text = std::env::var("CCAT_TRANSFER_FAULT").unwrap_or_default();
            let words = text.split(',').filter(|word| !word.is_empty());
            words
                .filter_map(|word| {
                    let order = parse(word);
                    if order.is_none() {
                        tracing::error!(word, "CCAT_TRANSFER_FAULT: unknown point or mode");
                    }
                    order
                })
                .collect()
        })
    }

    fn parse(word: &str) -> Option<Order> {
        let mut parts = word.split(':');
        let (point, mode) = (parts.next()?, parts.next()?);
        let nth = parts.next().map_or(Some(1), |nth| nth.parse().ok())?;
        let point = FaultPoint::ALL.iter().find(|p| p.name() == point)?;
        let mode = point.modes().iter().find(|m| m.name() == mode)?;
        (parts.next().is_none() && nth > 0).then_some(Order {
            point: *point,
            mode: *mode,
            countdown: AtomicU32::new(nth),
        })
    }

    #[cfg(test)]
    #[allow(clippy::unwrap_used, reason = "tests")]
    mod tests {
        use std::collections::HashSet;

        use super::*;

        #[test]
        fn every_name_and_mode_is_understood() {
            let names: HashSet<_> = FaultPoint::ALL.iter().map(|point| point.name()).collect();
            assert_eq!(names.len(), FaultPoint::ALL.len());
            for point in FaultPoint::ALL {
                for mode in point.modes() {
                    let order = parse(&format!("{}:{}:7", point.name(), mode.name()));
                    let read = order.map(|order| (order.point, order.mode));
                    assert_eq!(read, Some((*point, *mode)));
                }
            }
        }

        #[test]
        fn invalid_faults_are_refused() {
            for word in [
                "renamed",
                "renamed:burn",
                "renamed:kill:0",
                "renamed:kill:1:2",
                "nowhere:kill",
                "tidied:twice",
                "sweeper:kill",
            ] {
                assert!(parse(word).is_none(), "{word}");
            }
        }
    }
}
