//! A runtime on the in-memory broker, and deliveries whose settlement is observed, for tests of single steps.

use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::FutureExt as _;
use tokio::sync::oneshot;

use super::identity::Identity;
use super::runtime::Runtime;
use super::{Config, DefaultOptions, Shutdown, Worker};
use crate::broker::consumer::Settled;
use crate::broker::memory::MemoryBroker;
use crate::broker::{Delivery, Disposition, Settlement};
use crate::results::ResultBackend;
use crate::task::{Autoretry, RegisteredTask, Registry, TaskOptions};
use celery_protocol::RawMessage;
use serde_json::Value;

/// Creates the runtime of a worker that has not started, with a task `t` and the default options `options`.
pub(super) fn runtime(results: Arc<dyn ResultBackend>, options: DefaultOptions) -> Runtime {
    let mut registry = Registry::default();
    let registered = RegisteredTask {
        function: "t".into(),
        parameters: [].as_slice().into(),
        options: TaskOptions::DEFAULT,
        autoretry: Autoretry::new(&TaskOptions::DEFAULT),
        run: Arc::new(|_| async { Ok(Value::Null) }.boxed()),
        discard: Arc::new(|_, _| async {}.boxed()),
    };
    assert_eq!(registry.enter(["t"], &registered), Ok(()));
    let mut config = Config::new("celery@test", vec!["q".into()]);
    config.tasks = options;
    let broker = Arc::new(MemoryBroker::recording());
    Worker::new(registry, broker, results, config, Shutdown::default()).runtime
}

/// A settlement that records what happens to its delivery.
#[derive(Clone, Default)]
pub(super) struct ProbeSettlement {
    is_exempt: Arc<AtomicBool>,
    is_void: Arc<AtomicBool>,
    disposition: Arc<Mutex<Option<Disposition>>>,
}

impl ProbeSettlement {
    /// Creates a delivery of `message` with this settlement.
    pub(super) fn delivery(&self, message: RawMessage) -> Delivery {
        let route = (String::new(), "q".to_owned());
        Delivery::new(message, "q".into(), route, Box::new(self.clone()))
    }

    /// Ends the connection of the delivery.
    pub(super) fn lose(&self) {
        self.is_void.store(true, Relaxed);
    }

    pub(super) fn is_exempt(&self) -> bool {
        self.is_exempt.load(Relaxed)
    }

    /// Disposition of the delivery, once it is settled.
    pub(super) fn disposition(&self) -> Option<Disposition> {
        *self
            .disposition
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Settlement for ProbeSettlement {
    fn settle(self: Box<Self>, disposition: Disposition) -> Settled {
        *self
            .disposition
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(disposition);
        let (settled, settling) = oneshot::channel();
        let _ = settled.send(());
        settling
    }

    fn is_void(&self) -> bool {
        self.is_void.load(Relaxed)
    }

    fn set_exempt(&self, is_exempt: bool) {
        self.is_exempt.store(is_exempt, Relaxed);
    }
}

/// The identity of a message with this body.
pub(crate) fn identity(body: &str) -> Identity {
    Identity::of(&RawMessage {
        body: body.as_bytes().to_vec(),
        ..RawMessage::default()
    })
}
