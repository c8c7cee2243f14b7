//! What happens when the system allows no more watches.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use namespace::{Heard, Inotify, News, Watch, WatchError};
use tempfile::TempDir;

/// Run by the other one where the system allows no more than three watches.
#[tokio::test]
#[ignore = "needs a limit of three watches"]
async fn with_three_watches() {
    let base = TempDir::new().unwrap();
    let dirs = ["a", "b", "c", "d"].map(|name| base.path().join(name));
    dirs.iter().for_each(|dir| fs::create_dir(dir).unwrap());
    let (mut inotify, mut news) = Inotify::new(100).unwrap();
    dirs[..3].iter().for_each(|dir| inotify.watch(dir).unwrap());
    for _ in 0..2 {
        let refused = inotify.watch(&dirs[3]);
        assert!(matches!(&refused, Err(WatchError::Full { dir }) if *dir == dirs[3]), "{refused:?}");
    }
    // Those that there are stay.
    for dir in &dirs[..3] {
        inotify.watch(dir).unwrap();
        fs::write(dir.join("f"), "x").unwrap();
        told(&mut news, &dir.join("f")).await;
    }
    // A directory that is gone makes room.
    fs::remove_dir_all(&dirs[0]).unwrap();
    told(&mut news, &dirs[0]).await;
    inotify.watch(&dirs[3]).unwrap();
    fs::write(dirs[3].join("f"), "x").unwrap();
    told(&mut news, &dirs[3].join("f")).await;
}

async fn told(news: &mut News, path: &Path) {
    let changed = Heard::Changed(PathBuf::from(path));
    let heard = async { while news.recv().await.expect("the news go on") != changed {} };
    tokio::time::timeout(Duration::from_secs(10), heard).await.expect("it is heard within ten seconds");
}

/// A user namespace has a limit of its own, which whoever makes it may lower.
#[test]
fn no_more_watches() {
    let limit = "echo 3 > /proc/sys/user/max_inotify_watches";
    let user = |script: &str| Command::new("unshare").args(["-Ur", "sh", "-c", script]).output();
    if !user(limit).is_ok_and(|output| output.status.success()) {
        eprintln!("not tested: no user namespace can be made here");
        return;
    }
    let program = std::env::current_exe().unwrap();
    let run = format!("{limit} && exec '{}' --ignored --exact with_three_watches", program.display());
    let output = user(&run).unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{output:?}");
}
