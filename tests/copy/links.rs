//! Symbolic and hard links with our temporary names, planted at a destination: nothing is read,
//! changed or removed through them.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use ccat_transfer::transfer::endpoint::Target;
use ccat_transfer::transfer::failures::Role;
use rstest::rstest;

use crate::bench::Bench;
use crate::endpoints::{READ_OPTIONS, Way, bench, publish};

/// A file, and a directory with a file like a checkpoint, of other users.
struct Others {
    file: PathBuf,
    directory: PathBuf,
    checkpoint: PathBuf,
}

impl Others {
    fn new(bench: &Bench) -> Self {
        let directory = bench.path("others");
        fs::create_dir(&directory).unwrap();
        let others = Self {
            file: directory.join("file"),
            checkpoint: directory.join("bbcp.host.0f.name"),
            directory,
        };
        fs::write(&others.file, "precious").unwrap();
        fs::write(&others.checkpoint, "precious").unwrap();
        others
    }

    fn assert_untouched(&self) {
        for path in [&self.file, &self.checkpoint] {
            assert_eq!(fs::read(path).unwrap(), b"precious", "{path:?}");
        }
        assert_eq!(fs::read_dir(&self.directory).unwrap().count(), 2);
    }
}

fn exists(path: &std::path::Path) -> bool {
    path.symlink_metadata().is_ok()
}

fn names_of(target: &Target) -> [PathBuf; 2] {
    [target.temporary_path(), target.checkpoint_path()].map(|path| path.as_path().to_owned())
}

#[rstest]
#[tokio::test]
async fn removal_does_not_follow_links(#[values(Way::Local, Way::Ssh)] way: Way) {
    let Some(bench) = bench(Role::Destination, way) else {
        return;
    };
    let others = Others::new(&bench);
    let target = bench.plan().target;
    let [copy, checkpoints] = names_of(&target);
    symlink(&others.file, &copy).unwrap();
    symlink(&others.directory, &checkpoints).unwrap();
    target.remove_temporary().await.unwrap();
    others.assert_untouched();
    // The links have our names, so they are removed.
    assert!(!exists(&copy) && !exists(&checkpoints));

    fs::create_dir(&checkpoints).unwrap();
    symlink(&others.file, checkpoints.join("bbcp.host.0f.name")).unwrap();
    target.remove_temporary().await.unwrap();
    others.assert_untouched();
    assert!(!exists(&checkpoints));
}

#[rstest]
#[tokio::test]
async fn publication_does_not_follow_links(#[values(Way::Local, Way::Ssh)] way: Way) {
    let Some(bench) = bench(Role::Destination, way) else {
        return;
    };
    let others = Others::new(&bench);
    let target = bench.plan().target;
    let [copy, checkpoints] = names_of(&target);
    fs::write(&copy, "new").unwrap();
    symlink(&others.directory, &checkpoints).unwrap();
    publish(&target).await.unwrap();
    others.assert_untouched();
    assert_eq!(fs::read(target.path().as_path()).unwrap(), b"new");
    fs::remove_file(target.path().as_path()).unwrap();

    // A file that is not our copy must not be published.
    symlink(&others.file, &copy).unwrap();
    let error = publish(&target).await.unwrap_err();
    assert_eq!(error.code(), "storage", "{}", error.chain());
    assert!(!exists(target.path().as_path()));
    let facts = target.inspect_temporary().await.unwrap();
    assert!(facts.is_none_or(|facts| facts.size != 8), "{facts:?}");
    target.digest_temporary(READ_OPTIONS).await.unwrap_err();
    others.assert_untouched();
}

/// bbcp opens a partial copy by its name and appends to it: through a link it would write to another file.
#[rstest]
#[case::copy(true, false, false)]
#[case::hard_link(true, false, true)]
#[case::checkpoints(false, true, false)]
#[tokio::test]
async fn adoption_does_not_follow_links(
    #[values(Way::Local, Way::Ssh)] way: Way,
    #[case] copy_is_link: bool,
    #[case] checkpoints_are_link: bool,
    #[case] hard: bool,
) {
    let Some(bench) = bench(Role::Destination, way) else {
        return;
    };
    let others = Others::new(&bench);
    let [earlier, target] = [bench.plan().target, bench.plan().target];
    let [copy, checkpoints] = names_of(&earlier);
    match (copy_is_link, hard) {
        (true, true) => fs::hard_link(&others.file, &copy).unwrap(),
        (true, false) => symlink(&others.file, &copy).unwrap(),
        (false, _) => fs::write(&copy, "par").unwrap(),
    }
    if checkpoints_are_link {
        let renamed = others
            .directory
            .join(format!("bbcp.h.0f.{}", earlier.temporary()));
        fs::rename(&others.checkpoint, &renamed).unwrap();
        symlink(&others.directory, &checkpoints).unwrap();
        let there = target.begin_partial(Some(earlier.temporary())).await;
        assert_eq!(there.unwrap(), 0);
        fs::rename(renamed, &others.checkpoint).unwrap();
    } else {
        fs::create_dir(&checkpoints).unwrap();
        let there = target.begin_partial(Some(earlier.temporary())).await;
        assert_eq!(there.unwrap(), 0);
    }
    others.assert_untouched();
    // bbcp starts again, in a directory of its own.
    let [copy, checkpoints] = names_of(&target);
    assert!(!exists(&copy));
    let made = checkpoints.symlink_metadata().unwrap();
    assert!(made.is_dir());
}

/// A link exists at the path of the new directory of checkpoints.
#[rstest]
#[tokio::test]
async fn a_planted_directory_of_checkpoints_is_replaced(#[values(Way::Local, Way::Ssh)] way: Way) {
    let Some(bench) = bench(Role::Destination, way) else {
        return;
    };
    let others = Others::new(&bench);
    let target = bench.plan().target;
    let [copy, checkpoints] = names_of(&target);
    symlink(&others.directory, &checkpoints).unwrap();
    symlink(&others.file, &copy).unwrap();
    assert_eq!(target.begin_partial(None).await.unwrap(), 0);
    assert!(checkpoints.symlink_metadata().unwrap().is_dir());
    assert!(!exists(&copy));
    others.assert_untouched();
}

/// Another user's link below the location's directory leads out of it.
#[rstest]
#[tokio::test]
async fn directories_are_not_made_behind_links_of_others(#[values(Way::Local, Way::Ssh)] way: Way) {
    let Some(mut bench) = bench(Role::Destination, way) else {
        return;
    };
    let others = Others::new(&bench);
    let link = bench.path("destination/a");
    symlink(&others.directory, &link).unwrap();
    bench.relative_path = "a/b".into();
    // A link of the operator is followed.
    bench.plan().target.ensure_directory().await.unwrap();
    fs::remove_dir(others.directory.join("b")).unwrap();
    if std::os::unix::fs::lchown(&link, Some(65_534), Some(65_534)).is_err() {
        return eprintln!("skipped: only root can give a link away");
    }
    let error = bench.plan().target.ensure_directory().await.unwrap_err();
    assert_eq!(error.code(), "destination_denied", "{}", error.chain());
    others.assert_untouched();
}

#[rstest]
#[case::file(false)]
#[case::directory(true)]
#[tokio::test]
async fn the_log_is_not_written_through_links(#[case] directory: bool) {
    let bench = Bench::new(&[]);
    let others = Others::new(&bench);
    let logs = bench.path("logs");
    if directory {
        symlink(&others.directory, &logs).unwrap();
    } else {
        fs::create_dir(&logs).unwrap();
        symlink(&others.file, logs.join("7.log")).unwrap();
    }
    let error = bench.copy(&bench.plan()).await.unwrap_err();
    assert_eq!(error.code(), "log_file", "{}", error.chain());
    others.assert_untouched();
    assert!(bench.record().is_null(), "nothing was started");
}
