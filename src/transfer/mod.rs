//! The domain: leases, copies with bbcp, verification. Knows nothing of Celery.
