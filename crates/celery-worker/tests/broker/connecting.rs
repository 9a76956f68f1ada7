//! Connections: credentials, TLS and giving up.

use super::*;

#[tokio::test]
async fn connecting_ends_after_the_configured_attempts() {
    // No process listens there.
    let port = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port()
    };
    let reconnect = Reconnect::default();
    for (reconnect, setting) in [
        (
            Reconnect {
                on_startup: false,
                ..reconnect
            },
            "celery.broker_connection_retry_on_startup",
        ),
        (
            Reconnect {
                max_retries: 1,
                ..reconnect
            },
            "celery.broker_connection_max_retries",
        ),
    ] {
        let options = AmqpOptions {
            reconnect,
            ..AmqpOptions::new(format!("amqp://127.0.0.1:{port}"), "given-up")
        };
        let broker = Amqp::new(&options).unwrap();
        let mut consumer = broker.consume(subscription(&[&Queue::tasks("q")], 1));
        assert!(timeout(PATIENCE, consumer.next()).await.unwrap().is_none());
        let failure = consumer.failure().unwrap();
        assert!(failure.to_string().contains(setting), "{failure}");
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
    let publication = Publication {
        exchange: String::new(),
        routing_key: queue.name.clone(),
        message: RawMessage::default(),
        declare: None,
        mandatory: true,
    };
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
    let trusting = AmqpTls {
        ca_file: file("ca.pem"),
        ..AmqpTls::default()
    };
    let client = AmqpTls {
        cert_file: file("client.pem"),
        key_file: file("client.key"),
        ..trusting.clone()
    };
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
        let options = AmqpOptions {
            tls: tls.clone(),
            ..AmqpOptions::new(url, "tls")
        };
        let broker = Amqp::new(&options).unwrap();
        let queue = Queue::tasks(unique("tls"));
        let publication = Publication {
            exchange: String::new(),
            routing_key: queue.name.clone(),
            message: RawMessage::default(),
            declare: Some(Declaration::Queue(queue.clone())),
            mandatory: true,
        };
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
    let missing = AmqpOptions {
        tls: AmqpTls {
            ca_file: file("none.pem"),
            ..AmqpTls::default()
        },
        ..AmqpOptions::new(&guest, "tls")
    };
    let Err(error) = Amqp::new(&missing) else {
        panic!("a missing file is reported");
    };
    assert!(
        error.to_string().contains("celery.broker_ssl_ca_file"),
        "{error}"
    );
}
