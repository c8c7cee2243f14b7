use std::{
    collections::VecDeque,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;

/// What was heard of the watched directories.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    /// Something happened to this entry, or in this directory: an absolute path, below what [`Watch::watch`] was
    /// given. What is there now is to be looked at; nothing need be there.
    ///
    /// [`Watch::watch`]: crate::Watch::watch
    Changed(PathBuf),
    /// There was more than could be kept: anything may have happened anywhere, and directories may be watched no
    /// longer. All of them are to be watched again, and looked at.
    Lost,
}

/// The end of the way at which news come out.
#[derive(Debug)]
pub struct News(Arc<Shared>);

/// The end of the way at which news go in. Dropping it ends the news.
#[derive(Debug)]
pub struct Teller(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    news_max: usize,
    told: Notify,
}

#[derive(Debug, Default)]
struct Queue {
    changed: VecDeque<PathBuf>,
    /// Stands for all that was told until it is heard.
    lost: bool,
    ended: bool,
}

/// A way for news on which at most `news_max` paths wait. One more makes all of them one [`Heard::Lost`].
///
/// Until that is heard, nothing else waits: it covers what is told meanwhile too.
pub fn news(news_max: usize) -> (Teller, News) {
    let shared = Arc::new(Shared { queue: Mutex::default(), news_max, told: Notify::new() });
    (Teller(Arc::clone(&shared)), News(shared))
}

impl News {
    /// The next news; none when nothing will be told any more. Dropping the future loses nothing.
    pub async fn recv(&mut self) -> Option<Heard> {
        loop {
            if let Some(heard) = self.try_recv() {
                return Some(heard);
            }
            if self.0.queue().ended {
                // What was told between the two looks.
                return self.try_recv();
            }
            self.0.told.notified().await;
        }
    }

    /// The next news, if there is any now.
    pub fn try_recv(&mut self) -> Option<Heard> {
        let mut queue = self.0.queue();
        if std::mem::take(&mut queue.lost) {
            return Some(Heard::Lost);
        }
        queue.changed.pop_front().map(Heard::Changed)
    }
}

impl Teller {
    /// Tells that something happened at `path`, which is absolute. Never waits.
    pub fn changed(&self, path: PathBuf) {
        let mut queue = self.0.queue();
        if queue.lost || queue.changed.back() == Some(&path) {
            return;
        }
        if queue.changed.len() < self.0.news_max {
            queue.changed.push_back(path);
        } else {
            queue.lose();
        }
        drop(queue);
        self.0.told.notify_one();
    }

    /// Tells that anything may have happened anywhere.
    pub fn lost(&self) {
        self.0.queue().lose();
        self.0.told.notify_one();
    }

    /// Ends the news: what waits is still heard, and then nothing.
    pub(super) fn end(&self) {
        self.0.queue().ended = true;
        self.0.told.notify_one();
    }

    pub(super) fn is_ended(&self) -> bool {
        self.0.queue().ended
    }
}

impl Drop for Teller {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    fn lose(&mut self) {
        self.changed = VecDeque::new();
        self.lost = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(news: &mut News) -> Vec<Heard> {
        std::iter::from_fn(|| news.try_recv()).collect()
    }

    fn changed(path: &str) -> Heard {
        Heard::Changed(path.into())
    }

    #[test]
    fn one_too_many_is_lost_and_then_it_goes_on() {
        let (teller, mut news) = news(3);
        for path in ["/a", "/b", "/c"] {
            teller.changed(path.into());
        }
        assert_eq!(all(&mut news), [changed("/a"), changed("/b"), changed("/c")]);
        for path in ["/a", "/b", "/c", "/d", "/e", "/f", "/g", "/h", "/i"] {
            teller.changed(path.into());
        }
        assert_eq!(all(&mut news), [Heard::Lost]);
        teller.changed("/x".into());
        assert_eq!(all(&mut news), [changed("/x")]);
        teller.changed("/x".into());
        teller.lost();
        teller.lost();
        teller.changed("/y".into());
        assert_eq!(all(&mut news), [Heard::Lost]);
    }

    #[test]
    fn the_same_at_once_is_told_once() {
        let (teller, mut news) = news(2);
        for path in ["/a", "/a", "/a", "/b", "/b"] {
            teller.changed(path.into());
        }
        assert_eq!(all(&mut news), [changed("/a"), changed("/b")]);
        teller.changed("/b".into());
        assert_eq!(all(&mut news), [changed("/b")]);
    }

    #[tokio::test]
    async fn whoever_waits_hears_it_and_the_end() {
        let (teller, mut news) = news(2);
        let waiting = tokio::spawn(async move {
            let heard = [news.recv().await, news.recv().await, news.recv().await, news.recv().await];
            assert_eq!(heard, [Some(changed("/a")), Some(Heard::Lost), None, None]);
        });
        teller.changed("/a".into());
        tokio::task::yield_now().await;
        teller.lost();
        drop(teller);
        waiting.await.unwrap();
    }
}
