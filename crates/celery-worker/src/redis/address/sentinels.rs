//! Sentinels, which know the address of a master.

use redis::sentinel::{SentinelClient, SentinelClientBuilder, SentinelServerType};
use redis::{Client, ConnectionAddr, IntoConnectionInfo, RedisConnectionInfo, TlsMode};
use secrecy::ExposeSecret as _;

use super::{Certificates, Endpoint, RedisUrl};

impl RedisUrl {
    /// Name of the master that the sentinels report; none for a URL of a server.
    pub(crate) fn master(&self) -> Option<&str> {
        self.master.as_deref()
    }

    /// A client for each sentinel alone, with the same login as [`RedisUrl::open`]; empty for a URL of a server.
    pub(crate) fn sentinel_clients(&self) -> Vec<Client> {
        let mut login = RedisConnectionInfo::default();
        if !self.sentinel.username.is_empty() {
            login = login.set_username(&self.sentinel.username);
        }
        if !self.sentinel.password.expose_secret().is_empty() {
            login = login.set_password(self.sentinel.password.expose_secret());
        }
        let client = |address: ConnectionAddr| {
            let info = address.into_connection_info().ok()?;
            Client::open(info.set_redis_settings(login.clone())).ok()
        };
        self.sentinel_addresses().filter_map(client).collect()
    }

    /// Addresses of the sentinels.
    fn sentinel_addresses(&self) -> impl Iterator<Item = ConnectionAddr> {
        let endpoints = self.master.as_ref().map(|_| &self.endpoints);
        let addresses = endpoints.into_iter().flatten();
        addresses.filter_map(|endpoint| match endpoint {
            Endpoint::Tcp(host, port) => Some(ConnectionAddr::Tcp(host.clone(), *port)),
            Endpoint::Unix(_) => None,
        })
    }

    /// Client for the sentinels, which are queried without TLS, and without a login unless `sentinel_kwargs` has one,
    /// as in Celery.
    pub(super) fn sentinels(&self, master: &str) -> redis::RedisResult<SentinelClient> {
        let sentinels = self.sentinel_addresses();
        let mut builder =
            SentinelClientBuilder::new(sentinels, master, SentinelServerType::Master)?
                .set_client_to_redis_db(self.login.db())
                .set_client_to_redis_protocol(self.login.protocol());
        if !self.sentinel.username.is_empty() {
            builder = builder.set_client_to_sentinel_username(&self.sentinel.username);
        }
        if !self.sentinel.password.expose_secret().is_empty() {
            builder =
                builder.set_client_to_sentinel_password(self.sentinel.password.expose_secret());
        }
        if let Some(user) = self.login.username() {
            builder = builder.set_client_to_redis_username(user);
        }
        if let Some(password) = self.login.password() {
            builder = builder.set_client_to_redis_password(password);
        }
        if let Some(Certificates { is_verified, files }) = &self.certificates {
            builder = builder
                .set_client_to_redis_tls_mode(match is_verified {
                    true => TlsMode::Secure,
                    false => TlsMode::Insecure,
                })
                .set_client_to_redis_certificates(files.clone());
        }
        builder.build()
    }
}
