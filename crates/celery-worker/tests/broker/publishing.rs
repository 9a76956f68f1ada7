//! Publications and their confirms.

use super::*;

/// A queue is deleted while the connection of its producer stays open.
#[tokio::test]
async fn a_publication_declares_what_was_deleted() {
    let Some(url) = service("TEST_AMQP_URL") else {
        return;
    };
    let broker = amqp(&url, "declared-before");
    let queue = Queue::tasks(unique("declared"));
    publish(&broker, &queue, "first").await;
    ctl(&["delete_queue", &queue.name]).await;
    publish(&broker, &queue, "second").await;
    let depth = broker.survey(std::slice::from_ref(&queue.name)).await;
    assert_eq!(depth.unwrap()[0].messages, 1);
    // Also for the queue's own exchange, which the test's connection deletes.
    let mut through_exchange = publication(&queue, RawMessage::default());
    through_exchange.exchange.clone_from(&queue.name);
    broker.publish(&through_exchange, PATIENCE).await.unwrap();
    let eval = format!(
        "rabbit_exchange:delete(rabbit_misc:r(<<\"/\">>, exchange, <<\"{}\">>), false, <<\"test\">>).",
        queue.name
    );
    ctl(&["eval", &eval]).await;
    broker.publish(&through_exchange, PATIENCE).await.unwrap();
    let depth = broker.survey(std::slice::from_ref(&queue.name)).await;
    assert_eq!(depth.unwrap()[0].messages, 3);
    broker.close().await;
}

/// A message that closes its channel does not fail the others.
#[tokio::test]
async fn a_missing_exchange_fails_its_own_message_only() {
    let Some(url) = service("TEST_AMQP_URL") else {
        return;
    };
    let broker = amqp(&url, "foreign");
    let queue = Queue::tasks(unique("own"));
    let wrong = Publication::new(unique("nowhere"), "x", RawMessage::default());
    publish(&broker, &queue, "first").await;
    let good = async {
        for n in 0..50 {
            publish(&broker, &queue, &n.to_string()).await;
        }
    };
    let bad = async {
        for _ in 0..20 {
            let refused = broker.publish(&wrong, PATIENCE).await;
            assert!(
                matches!(refused, Err(BrokerError::Refused { .. })),
                "{refused:?}"
            );
        }
    };
    // One that is there shares the channel with those that are not.
    let topic = Publication::new("amq.topic", "x", RawMessage::default());
    let known = async {
        for _ in 0..20 {
            broker.publish(&topic, PATIENCE).await.unwrap();
        }
    };
    tokio::join!(good, bad, known);
    let mut consumer = consume(&broker, &[&queue], 0).await;
    for expected in ["first", "0", "1"] {
        let delivery = next(&mut consumer).await;
        assert_eq!(body(&delivery), expected);
        delivery.settle(Disposition::Ack).await;
    }
    broker.close().await;
}

/// Publishers do not wait for each other's confirms.
#[tokio::test]
async fn publications_are_confirmed_concurrently() {
    let Some(url) = service("TEST_AMQP_URL") else {
        return;
    };
    let broker = amqp(&url, "pipeline");
    let queue = quorum(&unique("pipeline"));
    publish(&broker, &queue, "0").await;
    let began = std::time::Instant::now();
    for _ in 0..50 {
        publish(&broker, &queue, "x").await;
    }
    let one_by_one = began.elapsed();
    let began = std::time::Instant::now();
    futures_util::future::join_all((0..50).map(|_| publish(&broker, &queue, "x"))).await;
    let together = began.elapsed();
    assert!(together < one_by_one, "{together:?} against {one_by_one:?}");
    broker.close().await;
}
