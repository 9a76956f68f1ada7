//! The record of blocks of partial copies.

use ccat_transfer::settings::{DigestAlgorithm, EnumLabels};
use ccat_transfer::transfer::digest::{self, ReadBlock};
use ccat_transfer::transfer::lease::LeaseError;
use ccat_transfer::transfer::repository::Repository;
use entity::FileEnd;

use crate::on_both_databases;
use crate::ops_db::Fixture;
use crate::transfer_rows::{failure, finished};

on_both_databases!(
    blocks_stay_until_they_are_deleted,
    a_lost_lease_records_no_block,
    a_database_without_digests_works_as_before,
);

fn block(index: u64, content: &[u8]) -> ReadBlock {
    let digest = digest::of(DigestAlgorithm::Sha256, None, content, |_| true).unwrap();
    ReadBlock {
        index,
        digest: digest.whole.unwrap(),
        state: (index == 0).then(|| "00ff".to_owned()),
    }
}

async fn blocks_stay_until_they_are_deleted(db: Fixture) {
    let repository = &db.repository;
    let (id, other) = (db.transfer().await, db.transfer().await);
    let (lease, _other) = (db.acquire(id).await.lease, db.acquire(other).await);
    let rows = [
        (FileEnd::Origin, "v1", block(1, b"old")),
        (FileEnd::Destination, "v", block(1, b"b")),
        (FileEnd::Origin, "v2", block(1, b"b")),
        (FileEnd::Origin, "v2", block(0, b"a")),
    ];
    for (end, version, block) in &rows {
        repository
            .record_block(&lease, *end, version, block)
            .await
            .unwrap();
    }
    repository
        .reset_for_retry(&lease, &failure())
        .await
        .unwrap();
    let recorded = async || {
        let mut found = repository.recorded_blocks(id).await.unwrap();
        found.sort_by_key(|row| (row.block.index, row.end == FileEnd::Destination));
        let shown = found.into_iter();
        shown
            .map(|row| (row.end, row.version, row.block))
            .collect::<Vec<_>>()
    };
    let expected = [3, 2, 1].map(|row: usize| {
        let (end, version, block) = rows[row].clone();
        (end, version.to_owned(), block)
    });
    assert_eq!(recorded().await, expected);
    assert_eq!(repository.recorded_blocks(other).await.unwrap(), []);

    repository.forget_blocks(id, 1, 2).await.unwrap();
    assert_eq!(recorded().await, [expected[0].clone(), expected[2].clone()]);
    repository.forget_blocks_of_ended().await.unwrap();
    assert_eq!(recorded().await.len(), 2);
    let lease = db.acquire(id).await.lease;
    repository.complete(&lease, &finished()).await.unwrap();
    repository.forget_blocks_of_ended().await.unwrap();
    assert_eq!(recorded().await, []);
}

async fn a_lost_lease_records_no_block(db: Fixture) {
    let id = db.transfer().await;
    let lease = db.acquire(id).await.lease;
    let repository = &db.repository;
    repository
        .reset_for_retry(&lease, &failure())
        .await
        .unwrap();
    let refused = repository
        .record_block(&lease, FileEnd::Origin, "v", &block(0, b"a"))
        .await;
    assert!(matches!(refused, Err(LeaseError::Lost)), "{refused:?}");
    assert_eq!(repository.recorded_blocks(id).await.unwrap(), []);
}

async fn a_database_without_digests_works_as_before(db: Fixture) {
    db.sql("DROP TABLE transfer_worker_digest").await;
    let repository = Repository::open(db.database.clone(), EnumLabels::Names)
        .await
        .unwrap();
    assert!(!repository.has_digests());
    let id = db.transfer().await;
    let lease = db.acquire(id).await.lease;
    assert_eq!(repository.recorded_blocks(id).await.unwrap(), []);
    repository.forget_blocks(id, 0, 0).await.unwrap();
    repository.complete(&lease, &finished()).await.unwrap();
}
