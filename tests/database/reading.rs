//! Reading of transfers and locations.

use ccat_transfer::transfer::repository::{Failure, Filter, Listing, SiteError};
use entity::Status;

use crate::ops_db::Fixture;
use crate::transfer_rows::failure;

crate::on_both_databases!(
    locations_of_a_site,
    a_transfer_is_read_with_all_its_parts,
    a_transfer_is_read_without_its_parts,
    texts_with_nul_are_stored,
    transfers_are_listed,
);

async fn locations_of_a_site(db: Fixture) {
    let names = db.repository.locations_of_site("ccat").await.unwrap();
    assert_eq!(names, ["buffer", "telescope_computer"]);
    match db.repository.locations_of_site("us").await.unwrap_err() {
        SiteError::Unknown { known, .. } => assert_eq!(known, ["ccat", "cologne"]),
        other => panic!("{other:?}"),
    }
}

async fn a_transfer_is_read_with_all_its_parts(db: Fixture) {
    let id = db.transfer().await;
    db.sql("UPDATE data_location SET active = false WHERE name = 'telescope_computer'")
        .await;
    let transfer = db.repository.transfer(id).await.unwrap().unwrap();
    let package = transfer.package.unwrap();
    assert!(package.relative_path.ends_with(&package.file_name));
    assert_eq!(package.size_bytes, Some(50_000_000_000));
    let origin = transfer.origin.unwrap();
    assert!(!origin.active);
    assert_eq!(origin.site.unwrap().short_name, "ccat");
    let disk = origin.disk.unwrap();
    assert_eq!(
        (disk.host.as_deref(), disk.path.as_str()),
        (Some("telescope.ccat.cl"), "/data/fyst")
    );
    assert!(transfer.destination.unwrap().active);
    assert_eq!(transfer.route.unwrap().method.as_deref(), Some("bbcp"));
}

async fn a_transfer_is_read_without_its_parts(db: Fixture) {
    let id = db.transfer().await;
    db.sql(&format!(
        "UPDATE data_transfer SET destination_location_id = \
         (SELECT id FROM data_location WHERE name = 'tapes') WHERE id = {id}"
    ))
    .await;
    db.sql("DELETE FROM data_transfer_route").await;
    let transfer = db.repository.transfer(id).await.unwrap().unwrap();
    let destination = transfer.destination.unwrap();
    assert_eq!(destination.storage_type.as_str(), "TAPE");
    assert!(destination.disk.is_none() && transfer.route.is_none());
}

async fn texts_with_nul_are_stored(db: Fixture) {
    let id = db.transfer().await;
    let lease = db.acquire(id).await.lease;
    let failure = Failure {
        message: "a\0b".to_owned(),
        ..failure()
    };
    db.repository
        .mark_permanent_failure(&lease, &failure)
        .await
        .unwrap();
    let transfer = db.repository.transfer(id).await.unwrap().unwrap();
    assert_eq!(
        transfer.failure_error_message.as_deref(),
        Some("a\u{fffd}b")
    );
}

async fn transfers_are_listed(db: Fixture) {
    let [first, second] = [db.transfer().await, db.transfer().await];
    db.acquire(first).await;
    let all = db.repository.list(&Listing::default()).await.unwrap();
    assert_eq!(
        all.iter().map(|t| t.id).collect::<Vec<_>>(),
        [second, first]
    );
    assert!(all[0].lease.is_none() && all[1].lease.is_some());
    assert!(all[0].file_name.as_ref().unwrap().ends_with(".tar"));
    let listing = Listing {
        filter: Filter {
            statuses: vec![Status::Pending],
            ..Filter::default()
        },
        limit: Some(5),
        ..Listing::default()
    };
    assert_eq!(db.repository.list(&listing).await.unwrap().len(), 1);
    let listing = Listing {
        limit: Some(1),
        ..Listing::default()
    };
    assert_eq!(db.repository.list(&listing).await.unwrap()[0].id, second);
}
