//! The result backend that the settings name.

use secrecy::SecretString;

use crate::settings::Celery;
use crate::wire::compression::Method;
use crate::worker::results::{DatabaseOptions, Expires, Options, RedisOptions, TableName, Tls};

impl From<&Celery> for Options {
    fn from(celery: &Celery) -> Self {
        let transport = &celery.result_backend_transport_options;
        let tls = &celery.redis_backend_use_ssl;
        let (names, schemas) = (&celery.database_table_names, &celery.database_table_schemas);
        let table = |schema: &str, name: &str| TableName {
            schema: schema.to_owned(),
            name: name.to_owned(),
        };
        Self {
            url: SecretString::from(celery.result_backend()),
            expires: Expires {
                results: celery.result_expires,
                // -1 is for "as the others".
                failures: u64::try_from(celery.result_failure_expires).ok(),
                chords: u64::try_from(celery.result_chord_expires).ok(),
            },
            persistent: celery.result_persistent,
            compression: Method::of(&celery.result_compression),
            redis: RedisOptions {
                key_prefix: transport.global_keyprefix.clone(),
                master_name: transport.master_name.clone(),
                chord_ordered: transport.result_chord_ordered,
                tls: Tls {
                    certificate: tls.ssl_cert_reqs.clone(),
                    authorities: tls.ssl_ca_certs.clone(),
                    client_certificate: tls.ssl_certfile.clone(),
                    client_key: tls.ssl_keyfile.clone(),
                },
            },
            database: DatabaseOptions {
                create_tables: celery.database_create_tables_at_setup,
                tasks: table(&schemas.task, &names.task),
                groups: table(&schemas.group, &names.group),
            },
        }
    }
}
