//! Connections: credentials, TLS and giving up.

use super::*;

#[tokio::test]
async fn connecting_ends_after_the_configured_attempts() {
    // No process listens there.
    let port = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port()
    };
    let mut only_once = Reconnect::default();
    only_once.on_startup = false;
    let mut twice = Reconnect::default();
    twice.max_retries = 1;
    for (reconnect, option) in [
        (only_once, "reconnect.on_startup"),
        (twice, "reconnect.max_retries"),
    ] {
        let mut options = AmqpOptions::new(format!("amqp://127.0.0.1:{port}"), "given-up");
        options.reconnect = reconnect;
        let broker = Amqp::new(&options).unwrap();
        let mut consumer = broker.consume(subscription(&[&Queue::tasks("q")], 1));
        assert!(timeout(PATIENCE, consumer.next()).await.unwrap().is_none());
        let failure = consumer.failure().unwrap();
        assert!(failure.to_string().contains(option), "{failure}");
    }
}

/// A password that changes under a running consumer: said, and tried again until it is right.
#[tokio::test]
async fn changed_password_is_retried_until_it_is_right() {
    let Some(url) = service("TEST_AMQP_URL") else {
        return;
    };
    let user = unique("user");
    ctl(&["add_user", &user, "first"]).await;
    ctl(&["set_permissions", &user, ".*", ".*", ".*"]).await;
    let url = url.replace("guest:guest", &format!("{user}:first"));
    let broker = amqp(&url, &user);
    let queue = Queue::tasks(unique("password"));
    let mut consumer = consume(&broker, &[&queue], 1).await;
    ctl(&["change_password", &user, "second"]).await;
    close_connections(&user).await;
    let mut connected = consumer.connected();
    timeout(PATIENCE, connected.wait_for(|up| !up))
        .await
        .unwrap()
        .unwrap();

    let other = amqp(&url, &format!("{user}-other"));
    let mut publication = publication(&queue, RawMessage::default());
    publication.declare = None;
    let refused = other.publish(&publication, PATIENCE).await.unwrap_err();
    let text = refused.to_string();
    assert!(text.contains("check user, password"), "{text}");
    assert!(
        !format!("{refused:?}{text}").contains("first"),
        "{refused:?}"
    );

    ctl(&["change_password", &user, "first"]).await;
    publish(&other, &queue, "x").await;
    next(&mut consumer).await.settle(Disposition::Ack).await;
    broker.close().await;
    other.close().await;
    ctl(&["delete_user", &user]).await;
}

#[tokio::test]
async fn tls_with_and_without_a_client_certificate() {
    let (Some(port), Some(files)) = (service("TEST_AMQPS_PORT"), service("TEST_TLS")) else {
        return;
    };
    let file = |name: &str| format!("{files}/{name}");
    let mut trusting = AmqpTls::default();
    trusting.ca_file = file("ca.pem");
    let mut client = trusting.clone();
    client.cert_file = file("client.pem");
    client.key_file = file("client.key");
    // The user that the broker takes from the certificate.
    let users = ctl(&["list_users", "-q"]).await;
    if !users.contains("tls-client") {
        ctl(&["add_user", "tls-client", &unique("unknown")]).await;
        ctl(&["set_permissions", "tls-client", ".*", ".*", ".*"]).await;
    }
    let guest = format!("amqps://guest:guest@localhost:{port}//");
    let external = format!("amqps://localhost:{port}//?auth_mechanism=external");
    let wrong_host = format!("amqps://guest:guest@127.0.0.1:{port}//");
    for (url, tls, works) in [
        (&guest, &trusting, true),
        (&guest, &client, true),
        (&external, &client, true),
        (&external, &trusting, false),
        (&guest, &AmqpTls::default(), false),
        (&wrong_host, &trusting, false),
    ] {
        let mut options = AmqpOptions::new(url.as_str(), "tls");
        options.tls = tls.clone();
        let broker = Amqp::new(&options).unwrap();
        let queue = Queue::tasks(unique("tls"));
        let publication = publication(&queue, RawMessage::default());
        let within = if works {
            PATIENCE
        } else {
            Duration::from_secs(2)
        };
        let published = broker.publish(&publication, within).await;
        assert_eq!(published.is_ok(), works, "{url} {tls:?}: {published:?}");
        if works {
            let mut consumer = consume(&broker, &[&queue], 1).await;
            next(&mut consumer).await.settle(Disposition::Ack).await;
        }
        broker.close().await;
    }
    let mut missing = AmqpOptions::new(guest.as_str(), "tls");
    missing.tls.ca_file = file("none.pem");
    let Err(error) = Amqp::new(&missing) else {
        panic!("a missing file is reported");
    };
    assert!(error.to_string().contains("tls.ca_file"), "{error}");
}
