//! Seeding of sites, locations and routes.

use ccat_transfer::transfer::topology::{self, NewTransfer, Topology, TopologyError};

use crate::ops_db::{Fixture, TOPOLOGY};

crate::on_both_databases!(seeding_is_idempotent, seeding_reports_what_is_wrong,);

async fn seeding_is_idempotent(db: Fixture) {
    let again = topology::seed(&db.repository, &TOPOLOGY.parse().unwrap())
        .await
        .unwrap();
    assert_eq!((again.created, again.updated, again.unchanged), (0, 0, 10));
    let changed = TOPOLOGY
        .replace("/data/fyst", "/data/fyst2")
        .replace("\"bbcp\"", "\"gridftp\"");
    let changed: Topology = changed.parse().unwrap();
    let seeded = topology::seed(&db.repository, &changed).await.unwrap();
    assert_eq!(
        (seeded.created, seeded.updated, seeded.unchanged),
        (0, 2, 8)
    );
    let id = db.transfer().await;
    let transfer = db.repository.transfer(id).await.unwrap().unwrap();
    assert_eq!(transfer.origin.unwrap().disk.unwrap().path, "/data/fyst2");
    assert_eq!(transfer.route.unwrap().method.as_deref(), Some("gridftp"));
}

async fn seeding_reports_what_is_wrong(db: Fixture) {
    let route = "[[routes]]\norigin='ccat'\ndestination='us'\nmethod='bbcp'\ntype='direct'";
    match topology::seed(&db.repository, &route.parse().unwrap())
        .await
        .unwrap_err()
    {
        TopologyError::UnknownSite { name, known } => {
            assert_eq!((name.as_str(), known.len()), ("us", 2));
        }
        other => panic!("{other:?}"),
    }
    let new = NewTransfer {
        relative_path: "a.tar".to_owned(),
        size_bytes: None,
        checksum: None,
        origin: "ccat/nowhere".parse().unwrap(),
        destination: "cologne/buffer".parse().unwrap(),
    };
    match topology::create_transfer(&db.repository, &new)
        .await
        .unwrap_err()
    {
        TopologyError::UnknownLocation { known, .. } => assert_eq!(known.len(), 4),
        other => panic!("{other:?}"),
    }
    db.sql("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
        .await;
    let owned = topology::seed(&db.repository, &TOPOLOGY.parse().unwrap()).await;
    assert!(matches!(owned, Err(TopologyError::OwnedByAlembic)));
    let owned = topology::create_transfer(&db.repository, &new).await;
    assert!(matches!(owned, Err(TopologyError::OwnedByAlembic)));
}
