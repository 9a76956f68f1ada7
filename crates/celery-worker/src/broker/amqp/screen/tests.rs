#![allow(clippy::panic, clippy::unwrap_used, reason = "tests")]

use amq_protocol::frame::{AMQPFrame, parse_frame};
use proptest::prelude::*;

use super::*;

const CHANNEL: u16 = 3;
const FRAME_MAX: u32 = 4096;
const BODY_MAX: u64 = 1000;

fn screen(is_last: bool) -> Screen {
    let limits = ConnectionLimits {
        frame: FRAME_MAX,
        is_last,
        bodies: Bodies {
            max: BODY_MAX,
            max_waiting: 100,
        },
    };
    Screen::new(limits, Arc::default())
}

fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).unwrap();
    let mut frame = vec![kind];
    frame.extend(CHANNEL.to_be_bytes());
    frame.extend(size.to_be_bytes());
    frame.extend(payload);
    frame.push(END);
    frame
}

fn text(bytes: &[u8]) -> Vec<u8> {
    [&[u8::try_from(bytes.len()).unwrap()], bytes].concat()
}

fn sized(tag: u8, content: &[u8]) -> Vec<u8> {
    let size = u32::try_from(content.len()).unwrap();
    [&[tag][..], &size.to_be_bytes(), content].concat()
}

/// The method at the beginning of a delivery.
fn deliver(tag: u64, exchange: &[u8], key: &[u8]) -> Vec<u8> {
    let ids = [0, 60, 0, 60];
    let tag = tag.to_be_bytes();
    let payload = [
        &ids[..],
        &text(b"ctag"),
        &tag,
        &[0],
        &text(exchange),
        &text(key),
    ];
    frame(METHOD, &payload.concat())
}

/// A content header with headers and a message id.
fn header(body: u64, table: &[u8], message_id: &[u8]) -> Vec<u8> {
    let flags: u16 = 1 << 13 | 1 << 7;
    let size = body.to_be_bytes();
    let payload = [
        &[0, 60, 0, 0][..],
        &size,
        &flags.to_be_bytes(),
        &sized(b'F', table)[1..],
        &text(message_id),
    ];
    frame(HEADER, &payload.concat())
}

fn body(content: &[u8]) -> Vec<u8> {
    frame(BODY, content)
}

/// Output of the screen for a stream that arrives in pieces.
fn run(screen: &mut Screen, stream: &[u8], pieces: &[usize]) -> Vec<u8> {
    let mut through = Vec::new();
    let mut rest = stream;
    for piece in pieces.iter().chain([&stream.len()]) {
        let (now, later) = rest.split_at((*piece).min(rest.len()));
        rest = later;
        let mut data = std::mem::take(screen.partial());
        data.extend_from_slice(now);
        let ready = screen.process(&mut data);
        through.extend_from_slice(&data[..ready]);
    }
    through
}

/// Reads a stream as the library does; a frame that the library cannot read is an error.
fn frames(mut stream: &[u8]) -> Result<Vec<AMQPFrame>, String> {
    let mut frames = Vec::new();
    while !stream.is_empty() {
        let (rest, frame) = parse_frame(stream).map_err(|e| format!("{e:?} at {stream:?}"))?;
        stream = rest;
        frames.push(frame);
    }
    Ok(frames)
}

#[test]
fn valid_frames_pass_unchanged() {
    let table = [
        text("é".as_bytes()),
        sized(b'S', b"\xff"),
        text(b""),
        b"V".to_vec(),
    ]
    .concat();
    let stream = [
        deliver(1, b"", b"q"),
        header(3, &table, b"m"),
        body(b"\xff\0a"),
    ]
    .concat();
    let mut screen = screen(true);
    assert_eq!(run(&mut screen, &stream, &[]), stream);
    assert_eq!(screen.notes.take(CHANNEL, 1), None);
}

#[test]
fn invalid_utf8_becomes_question_marks() {
    let table = [text(b"na\x8dme"), b"t\x01".to_vec()].concat();
    let stream = [
        deliver(7, b"ex\xff", "é".as_bytes()),
        header(0, &table, b"\xc3\x28\xe2\x82"),
    ]
    .concat();
    let mut screen = screen(true);
    let through = run(&mut screen, &stream, &[]);
    let same = [
        deliver(7, b"ex?", "é".as_bytes()),
        header(0, &[text(b"na?me"), b"t\x01".to_vec()].concat(), b"?(??"),
    ];
    assert_eq!(through, same.concat());
    let damage = screen.notes.take(CHANNEL, 7).unwrap();
    assert!(
        damage.is_not_utf8 && damage.unreadable.is_none(),
        "{damage:?}"
    );
}

#[test]
fn too_deep_values_become_bytes() {
    let mut value = b"V".to_vec();
    for depth in 0..600 {
        value = match depth % 2 {
            0 => sized(b'A', &value),
            _ => sized(b'F', &[text(b"k"), value].concat()),
        };
    }
    let table = [text(b"deep"), value, text(b"after"), b"t\x01".to_vec()].concat();
    let stream = [deliver(1, b"", b"q"), header(0, &table, b"m")].concat();
    let mut screen = Screen::new(
        ConnectionLimits {
            frame: 1 << 17,
            is_last: true,
            bodies: Bodies::ALL,
        },
        Arc::default(),
    );
    let through = run(&mut screen, &stream, &[]);
    assert_eq!(through.len(), stream.len());
    let changed = through.iter().zip(&stream).filter(|(a, b)| a != b).count();
    assert_eq!(changed, 1);
    let read = frames(&through).unwrap();
    let AMQPFrame::Header(_, header) = &read[1] else {
        panic!("no header: {read:?}");
    };
    assert_eq!(
        header.properties.headers().as_ref().unwrap().inner().len(),
        2
    );
    assert!(screen.notes.take(CHANNEL, 1).unwrap().is_too_deep);
}

#[test]
fn properties_that_cannot_be_read_are_left_out_with_their_body() {
    let unknown = [text(b"x"), b"Z123".to_vec()].concat();
    let cut = [text(b"x"), b"S\0\0\xff\0".to_vec()].concat();
    for table in [unknown, cut] {
        let bad = [
            deliver(1, b"", b"q"),
            header(7, &table, b"m"),
            body(b"abc"),
            body(b"defg"),
        ];
        let good = [deliver(2, b"", b"q"), header(1, b"", b"m"), body(b"a")];
        let mut screen = screen(false);
        let through = run(&mut screen, &[bad.concat(), good.concat()].concat(), &[]);
        let read = frames(&through).unwrap();
        let AMQPFrame::Header(_, header) = &read[1] else {
            panic!("no header: {read:?}");
        };
        assert_eq!(header.body_size, 0);
        assert_eq!(read[2..4], [AMQPFrame::Heartbeat, AMQPFrame::Heartbeat]);
        assert_eq!(
            through[through.len() - good.concat().len()..],
            good.concat()
        );
        assert!(screen.notes.take(CHANNEL, 1).unwrap().unreadable.is_some());
        assert_eq!(screen.notes.take(CHANNEL, 2), None);
    }
}

#[test]
fn headers_beyond_the_largest_frame_are_left_out() {
    let table = [text(b"x"), sized(b'S', &vec![b'a'; FRAME_MAX as usize])].concat();
    let stream = [
        deliver(1, b"", b"q"),
        header(1, &table, b"m"),
        body(b"a"),
        deliver(2, b"", b"q"),
    ]
    .concat();
    // The next connection has larger frames.
    assert_eq!(run(&mut screen(false), &stream, &[]), stream);
    let mut screen = screen(true);
    let through = run(&mut screen, &stream, &[10, 40, 22]);
    assert_eq!(frames(&through).unwrap().len(), 4);
    assert!(through.len() < 200);
    assert!(screen.notes.take(CHANNEL, 1).unwrap().unreadable.is_some());
}

#[test]
fn a_body_above_the_limit_is_left_out() {
    let piece = vec![b'a'; 600];
    let stream = [
        deliver(1, b"", b"q"),
        header(1200, b"", b"m"),
        body(&piece),
        body(&piece),
        deliver(2, b"", b"q"),
    ];
    let mut screen = screen(true);
    let through = run(&mut screen, &stream.concat(), &[]);
    let read = frames(&through).unwrap();
    assert_eq!(read[2..4], [AMQPFrame::Heartbeat, AMQPFrame::Heartbeat]);
    assert_eq!(read.len(), 5);
    assert_eq!(
        screen.notes.take(CHANNEL, 1).unwrap().body_bytes,
        Some(1200)
    );
}

#[test]
fn a_body_waits_with_the_broker_until_the_tasks_time() {
    let named =
        |name: &str, value: &str| [text(name.as_bytes()), sized(b'S', value.as_bytes())].concat();
    let task = [named("task", "t"), named("id", "a")].concat();
    let later = named("eta", "2999-01-01T00:00:00+00:00");
    for (table, size, awaits_eta) in [
        ([&task[..], &later].concat(), 101, true),
        ([&task[..], &later].concat(), 100, false),
        (later.clone(), 101, false),
        (
            [&task[..], &named("eta", "2001-01-01T00:00:00")].concat(),
            101,
            false,
        ),
        ([&task[..], &named("eta", "soon")].concat(), 101, false),
        (
            [
                &task[..],
                &later,
                &text(b"x-delivery-count"),
                b"l\0\0\0\0\0\0\0\x01",
            ]
            .concat(),
            101,
            false,
        ),
        (
            [&text(b"x")[..], &sized(b'F', &[&task[..], &later].concat())].concat(),
            101,
            false,
        ),
    ] {
        let stream = [
            deliver(1, b"", b"q"),
            header(size, &table, b"m"),
            body(&vec![b'a'; size as usize]),
        ]
        .concat();
        let mut screen = screen(true);
        let through = run(&mut screen, &stream, &[]);
        assert_eq!(
            screen
                .notes
                .take(CHANNEL, 1)
                .is_some_and(|damage| damage.awaits_eta),
            awaits_eta
        );
        assert_eq!(through == stream, !awaits_eta);
        frames(&through).unwrap();
    }
}

#[test]
fn the_brokers_limit_of_frames_is_kept() {
    let tune = frame(METHOD, &[0, 10, 0, 30, 0, 0, 0, 0, 2, 0, 0, 0]);
    let mut screen = screen(true);
    assert_eq!(run(&mut screen, &tune, &[]), tune);
    assert_eq!(screen.limits.frame, 512);
}

#[test]
fn texts_of_other_methods_are_screened_too() {
    // channel.close: 404, "no queue …", truncated within a character; basic.return; queue.declare-ok.
    for (payload, expected) in [
        (
            &b"\0\x14\0\x28\x01\x94\x02a\xc3\0\0\0\0"[..],
            &b"\0\x14\0\x28\x01\x94\x02a?\0\0\0\0"[..],
        ),
        (
            b"\0\x3c\0\x32\x01\x38\x01\xff\x01\xfe\x01\xfd",
            b"\0\x3c\0\x32\x01\x38\x01?\x01?\x01?",
        ),
        (
            b"\0\x32\0\x0b\x01\xff\0\0\0\0\0\0\0\0",
            b"\0\x32\0\x0b\x01?\0\0\0\0\0\0\0\0",
        ),
    ] {
        let through = run(&mut screen(true), &frame(METHOD, payload), &[]);
        assert_eq!(through, frame(METHOD, expected));
        frames(&through).unwrap();
    }
}

/// A field's value, mostly of a known type.
fn value() -> impl Strategy<Value = Vec<u8>> {
    let odd = prop_oneof![
        "[a-zé]{0,9}".prop_map(String::into_bytes),
        prop::collection::vec(any::<u8>(), 0..9)
    ];
    let scalar = |tag: u8, size: usize| {
        prop::collection::vec(any::<u8>(), size)
            .prop_map(move |bytes| [&[tag][..], &bytes].concat())
    };
    let leaf = prop_oneof![
        Just(b"V".to_vec()),
        scalar(b't', 1),
        scalar(b'I', 4),
        scalar(b'D', 5),
        scalar(b'T', 8),
        scalar(b'd', 8),
        scalar(b'u', 2),
        odd.clone().prop_map(|bytes| sized(b'S', &bytes)),
        odd.clone().prop_map(|bytes| sized(b'x', &bytes)),
        prop::collection::vec(any::<u8>(), 1..6),
    ];
    leaf.prop_recursive(5, 40, 5, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5)
                .prop_map(|values| sized(b'A', &values.concat())),
            prop::collection::vec((odd.clone(), inner), 0..5).prop_map(|fields| {
                let fields = fields
                    .into_iter()
                    .map(|(name, value)| [text(&name), value].concat());
                sized(b'F', &fields.collect::<Vec<_>>().concat())
            }),
        ]
    })
}

fn message() -> impl Strategy<Value = Vec<u8>> {
    let short = || prop::collection::vec(any::<u8>(), 0..20);
    let flip = prop::option::of((any::<prop::sample::Index>(), any::<u8>()));
    (
        1..u64::MAX,
        short(),
        short(),
        value(),
        short(),
        prop::collection::vec(any::<u8>(), 0..1500),
        flip,
    )
        .prop_map(|(tag, exchange, key, value, message_id, content, flip)| {
            let mut header = header(
                content.len() as u64,
                &[text(b"h"), value].concat(),
                &message_id,
            );
            if let Some((at, byte)) = flip {
                // Only within the properties: the broker itself writes all other bytes.
                let properties = HEAD + 12..header.len() - 1;
                header[properties.start + at.index(properties.len())] = byte;
            }
            let bodies = content.chunks(400).map(body).collect::<Vec<_>>().concat();
            [deliver(tag, &exchange, &key), header, bodies].concat()
        })
}

proptest! {
    /// The library can read every stream after the screen, for any content and any split into pieces.
    #[test]
    fn screened_frames_are_readable_by_the_library(
        messages in prop::collection::vec(message(), 1..6),
        pieces in prop::collection::vec(1_usize..200, 0..60),
    ) {
        let stream = messages.concat();
        let whole = run(&mut screen(true), &stream, &[]);
        let read = frames(&whole).map_err(TestCaseError::fail)?;
        let deliveries = read.iter().filter(|frame| matches!(frame, AMQPFrame::Header(..)));
        prop_assert_eq!(deliveries.count(), messages.len());
        prop_assert_eq!(run(&mut screen(true), &stream, &pieces), whole);
    }

    #[test]
    fn any_bytes_are_read_without_panic(stream in prop::collection::vec(any::<u8>(), 0..300), pieces in prop::collection::vec(1_usize..50, 0..9)) {
        let mut screen = screen(true);
        run(&mut screen, &stream, &pieces);
        let typed: Vec<u8> = stream.chunks(40).enumerate().flat_map(|(i, chunk)| frame(1 + (i % 3) as u8, chunk)).collect();
        run(&mut screen, &typed, &pieces);
    }
}
