//! Fault points: named places in a transfer's life where a test has the process die, fail, stop or
//! repeat itself.
//!
//! Only with the feature `fault-points`, which no release can have; without it [`fault_point!`] is
//! the step it wraps and nothing else, and none of the names is in the program.
//!
//! A step is wrapped where it is made, `fault_point!(Renamed, target.publish().await)?`; the fault
//! comes **after** the step has had its effect, which is the worst moment: the work is done and
//! nobody knows. What dies before a step dies after the one before it.
//!
//! `CCAT_TRANSFER_FAULT` says what is to happen in this process, separated by commas:
//! `POINT:MODE[:N]`, at the N-th time (from 1) that the point is reached, and only then.
//!
//! | mode | what happens |
//! | --- | --- |
//! | `kill` | SIGKILL to this process |
//! | `fail` | the step answers with its infrastructure error: its own answer is lost |
//! | `twice` | the step is made again, at once |
//! | `pause` | SIGSTOP to this process: it goes on when somebody sends SIGCONT, as if nothing had been |
//!
//! [`hang_point!`] makes a loop stand still: `sweeper:hang`, `manager_loop:hang`. The worker has steps of its own, see
//! `celery_worker::fault_injection`: `lane:panic`, `subscription:panic`.
//!
//! A test that runs in the same process plans faults for one call, by `with_faults`.

#[cfg(all(feature = "fault-points", not(debug_assertions)))]
compile_error!("fault points are for tests: a build without debug assertions must not have them");

/// Names a step, or (without one) a moment between two steps; see [the module](self).
#[cfg(not(feature = "fault-points"))]
macro_rules! fault_point {
    ($point:ident, $step:expr) => {
        $step
    };
    ($point:ident) => {};
}

/// Names a step, or (without one) a moment between two steps; see [the module](self).
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

/// Names a loop that can be made to hang here for ever.
#[cfg(not(feature = "fault-points"))]
macro_rules! hang_point {
    ($point:ident) => {};
}

/// Names a loop that can be made to hang here for ever.
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

    /// What can happen at a point.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub enum Mode {
        /// The process dies.
        Kill,
        /// The step's answer is lost.
        Fail,
        /// The step is made again.
        Twice,
        /// The process stands still until it is told to go on.
        Pause,
        /// A loop stands still for ever.
        Hang,
        /// A loop panics.
        Panic,
    }

    impl Mode {
        /// As in `CCAT_TRANSFER_FAULT`.
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

    /// For steps that can be made again.
    const STEP: &[Mode] = &[Mode::Kill, Mode::Fail, Mode::Twice, Mode::Pause];
    /// For places where nothing is made again, but where the way can end.
    const PASSAGE: &[Mode] = &[Mode::Kill, Mode::Fail, Mode::Pause];
    /// For places where nothing can fail.
    const MOMENT: &[Mode] = &[Mode::Kill, Mode::Pause];
    /// For loops.
    const LOOP: &[Mode] = &[Mode::Hang];
    /// Panics of the loops of a consumer.
    const CONSUMER: &[Mode] = &[Mode::Panic];

    macro_rules! points {
        ($($(#[$doc:meta])* $point:ident = $name:literal, $modes:ident;)*) => {
            /// A place where a fault can be made.
            #[derive(Debug, Clone, Copy, PartialEq, Eq)]
            pub enum FaultPoint {
                $($(#[$doc])* $point,)*
            }

            impl FaultPoint {
                /// Every one, in the order of a transfer's life, and then the loops.
                pub const ALL: &[Self] = &[$(Self::$point),*];

                /// As in `CCAT_TRANSFER_FAULT`.
                #[must_use]
                pub fn name(self) -> &'static str {
                    match self { $(Self::$point => $name),* }
                }

                /// What can happen here.
                #[must_use]
                pub fn modes(self) -> &'static [Mode] {
                    match self { $(Self::$point => $modes),* }
                }
            }
        };
    }

    points! {
        /// The manager has written SCHEDULED, and not committed it.
        ManagerRowLocked = "manager_row_locked", STEP;
        /// The manager's message is at the broker, and SCHEDULED not committed.
        ManagerPublished = "manager_published", STEP;
        /// SCHEDULED is committed.
        ManagerCommitted = "manager_committed", STEP;
        /// A sweep has written what is to become of a dead lease, and not committed it.
        SweepWritten = "sweep_written", STEP;
        /// A sweep has committed that.
        SweepCommitted = "sweep_committed", STEP;

        /// The worker has accepted a message.
        TaskAccepted = "task_accepted", MOMENT;
        /// The lease is ours.
        LeaseTaken = "lease_taken", STEP;
        /// The rows that the plan is made of have been read.
        PlanRead = "plan_read", STEP;
        /// No other transfer can copy to the same place now.
        Claimed = "claimed", STEP;
        /// Both ends have been looked at, and the directory is made.
        Prepared = "prepared", STEP;
        /// What dead attempts left has been removed.
        LeftoversSwept = "leftovers_swept", MOMENT;
        /// The marker that tells whether both ends are one directory is made.
        MarkerMade = "marker_made", MOMENT;
        /// The names of the attempt's files are in the database, and there is no file.
        FilesRecorded = "files_recorded", STEP;
        /// An earlier attempt's partial copy has this attempt's name.
        PartialBegun = "partial_begun", STEP;
        /// bbcp runs.
        CopySpawned = "copy_spawned", PASSAGE;
        /// The first progress of the copy has been seen.
        FirstProgress = "first_progress", PASSAGE;
        /// bbcp has ended well.
        CopyEnded = "copy_ended", STEP;
        /// The origin's digest is known.
        OriginDigested = "origin_digested", PASSAGE;
        /// The copy's digest is known.
        DestinationDigested = "destination_digested", STEP;
        /// The copy is verified.
        Verified = "verified", PASSAGE;
        /// The database has said that the lease is ours; the rename is next.
        LeaseConfirmed = "lease_confirmed", STEP;
        /// The copy has its final name, and the row says IN_PROGRESS.
        Renamed = "renamed", STEP;
        /// The end of an attempt is written, and not committed.
        SettlementWritten = "settlement_written", STEP;
        /// COMPLETED is committed.
        Completed = "completed", STEP;
        /// The task is done, and there is no result.
        TaskDone = "task_done", MOMENT;
        /// The result is stored, and the message is not acknowledged.
        ResultStored = "result_stored", STEP;
        /// The message is acknowledged.
        Acknowledged = "acknowledged", MOMENT;

        /// A failed attempt's temporary file has been removed.
        Tidied = "tidied", MOMENT;
        /// The failures so far have been counted, and this one is in no row.
        FailureCounted = "failure_counted", STEP;
        /// PENDING with one more failure is committed.
        RetryWritten = "retry_written", STEP;
        /// FAILED is committed.
        FailureWritten = "failure_written", STEP;
        /// A transfer that something kept from being done has been put off.
        Postponed = "postponed", STEP;
        /// A stopped transfer has been given back.
        Released = "released", STEP;

        /// The loop that sweeps dead leases.
        Sweeper = "sweeper", LOOP;
        /// The loop of the manager.
        ManagerLoop = "manager_loop", LOOP;
        /// The loop that hands the deliveries of one queue on.
        Lane = "lane", CONSUMER;
        /// The loop that keeps a subscription served.
        Subscription = "subscription", CONSUMER;
    }

    /// The answer of a step is lost. Every kind of error that a step can have is made from it: the
    /// one that infrastructure gives.
    #[derive(Debug, thiserror::Error)]
    #[error("fault injected at `{}`", .0.name())]
    pub struct AnswerLost(pub FaultPoint);

    /// What a step has to do for a fault.
    #[derive(Debug)]
    pub enum Fault {
        /// Answer with this.
        Fail(AnswerLost),
        /// Be made again.
        Twice,
    }

    impl FaultPoint {
        /// Called wherever the point is; dies and stops here and now.
        #[must_use]
        pub fn reached(self) -> Option<Fault> {
            match self.due()? {
                Mode::Kill => signal_self(Signal::SIGKILL),
                Mode::Pause => signal_self(Signal::SIGSTOP),
                Mode::Fail => Some(Fault::Fail(AnswerLost(self))),
                Mode::Twice => Some(Fault::Twice),
                // A step is no loop.
                Mode::Hang | Mode::Panic => None,
            }
        }

        /// Called in a loop's every round: whether it has to stand still.
        #[must_use]
        pub fn hangs(self) -> bool {
            self.due() == Some(Mode::Hang)
        }

        /// Returns true if the loop has to panic. Called in every round of a loop.
        #[must_use]
        pub fn panics(self) -> bool {
            self.due() == Some(Mode::Panic)
        }

        /// Whether it is a loop and no step.
        #[must_use]
        pub fn is_loop(self) -> bool {
            [LOOP, CONSUMER].contains(&self.modes())
        }

        /// What is to happen here and now.
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

    /// Makes the worker ask this module at its own steps.
    pub fn install_in_worker() {
        celery_worker::fault_injection::install(|step| {
            use celery_worker::fault_injection::{AnswerLost, Fault, Step};
            let point = match step {
                Step::TaskAccepted => FaultPoint::TaskAccepted,
                Step::ResultStored => FaultPoint::ResultStored,
                Step::Acknowledged => FaultPoint::Acknowledged,
                Step::QueueConsumer => FaultPoint::Lane,
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

    /// Runs `work` with faults that belong to it alone: each happens once, when its point is next
    /// reached in the same task.
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

    /// Forgets what a step answered; a transaction in it is rolled back.
    pub fn lose<T>(_answer: T) {}

    /// To this very thread, so that it does not go one step further before the process obeys.
    fn signal_self(signal: Signal) -> Option<Fault> {
        if let Err(error) = raise(signal) {
            tracing::error!(%error, "the fault could not be made");
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
                        tracing::error!(word, "CCAT_TRANSFER_FAULT: no such point or mode");
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
        fn what_cannot_be_is_not_understood() {
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
