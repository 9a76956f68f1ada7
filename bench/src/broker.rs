//! Queues and messages in the form that a Python producer creates.

use lapin::options::{
    ConfirmSelectOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable, LongString};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, ExchangeKind};
use serde_json::json;
use uuid::Uuid;

use crate::Outcome;

pub(crate) async fn connect(broker: &str) -> Outcome<Connection> {
    Ok(Connection::connect(broker, ConnectionProperties::default()).await?)
}

pub(crate) async fn confirming(connection: &Connection) -> Outcome<Channel> {
    let channel = connection.create_channel().await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    Ok(channel)
}

/// Declares a task queue with its exchange.
pub(crate) async fn declare_tasks(channel: &Channel, queue: &str) -> Outcome {
    let durable = QueueDeclareOptions {
        durable: true,
        ..QueueDeclareOptions::default()
    };
    channel
        .exchange_declare(
            queue.into(),
            ExchangeKind::Direct,
            ExchangeDeclareOptions {
                durable: true,
                ..ExchangeDeclareOptions::default()
            },
            FieldTable::default(),
        )
        .await?;
    channel
        .queue_declare(queue.into(), durable, FieldTable::default())
        .await?;
    channel
        .queue_bind(
            queue.into(),
            queue.into(),
            queue.into(),
            QueueBindOptions::default(),
            FieldTable::default(),
        )
        .await?;
    Ok(())
}

/// Declares a queue for results like the rpc backend's, but not exclusive, since several processes use it.
pub(crate) async fn declare_replies(channel: &Channel, queue: &str) -> Outcome {
    let options = QueueDeclareOptions {
        durable: true,
        ..QueueDeclareOptions::default()
    };
    channel
        .queue_declare(queue.into(), options, FieldTable::default())
        .await?;
    Ok(())
}

/// Makes a message for `task(2, 2)`: body, properties and task id.
pub(crate) fn task(task: &str, reply_to: &str) -> (Vec<u8>, BasicProperties, String) {
    let id = Uuid::new_v4().to_string();
    let body =
        json!([[2, 2], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]);
    let text = |text: &str| AMQPValue::LongString(LongString::from(text.as_bytes()));
    let mut headers = FieldTable::default();
    for (name, value) in [
        ("lang", text("py")),
        ("task", text(task)),
        ("id", text(&id)),
        ("root_id", text(&id)),
        ("parent_id", AMQPValue::Void),
        ("group", AMQPValue::Void),
        ("argsrepr", text("(2, 2)")),
        ("kwargsrepr", text("{}")),
        ("origin", text("bench")),
        ("retries", AMQPValue::LongInt(0)),
        ("eta", AMQPValue::Void),
        ("expires", AMQPValue::Void),
        ("shadow", AMQPValue::Void),
        ("ignore_result", AMQPValue::Boolean(false)),
    ] {
        headers.insert(name.into(), value);
    }
    let properties = BasicProperties::default()
        .with_content_type("application/json".into())
        .with_content_encoding("utf-8".into())
        .with_delivery_mode(2)
        .with_priority(0)
        .with_correlation_id(id.as_str().into())
        .with_reply_to(reply_to.into())
        .with_headers(headers);
    (body.to_string().into_bytes(), properties, id)
}
