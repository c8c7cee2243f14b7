//! What was said and what is linked, path by path, a page at a time: two of the three lists that reconciling merges.

use blobstore::{FileRow, RootId, Store};
use namespace::{ArenaName, Known, Namespace, RelPath};

use crate::failure::Failure;

/// A list in the order of paths, of which only a page is in memory.
pub(super) struct Pages<'a, T> {
    /// Gives the page behind a path.
    fetch: Fetch<'a, T>,
    page: std::vec::IntoIter<(RelPath, T)>,
    last: Option<RelPath>,
    ended: bool,
}

type Page<T> = Result<Vec<(RelPath, T)>, Failure>;
type Fetch<'a, T> = Box<dyn Fn(Option<&RelPath>) -> Page<T> + 'a>;

impl<'a, T> Pages<'a, T> {
    fn new(fetch: impl Fn(Option<&RelPath>) -> Page<T> + 'a) -> Self {
        Self { fetch: Box::new(fetch), page: Vec::new().into_iter(), last: None, ended: false }
    }

    /// The path that comes next.
    pub(super) fn peek(&mut self) -> Result<Option<&RelPath>, Failure> {
        if self.page.len() == 0 && !self.ended {
            let page = (self.fetch)(self.last.as_ref())?;
            self.ended = page.len() < PAGE_ROWS;
            self.last = page.last().map(|(path, _)| path.clone());
            self.page = page.into_iter();
        }
        Ok(self.page.as_slice().first().map(|(path, _)| path))
    }

    /// Takes what comes next, if it is at `path`.
    pub(super) fn take(&mut self, path: &RelPath) -> Result<Option<T>, Failure> {
        let is_there = self.peek()? == Some(path);
        Ok(if is_there { self.page.next().map(|(_, row)| row) } else { None })
    }
}

/// What this machine has said of what is at and below `within`, or of the whole arena.
pub(super) fn said<'a>(
    namespace: &'a Namespace,
    arena: &'a ArenaName,
    within: Option<&'a RelPath>,
) -> Pages<'a, Known> {
    Pages::new(move |after| {
        let page = namespace.known(arena, within, after, PAGE_ROWS)?;
        Ok(page.into_iter().map(|known| (known.path.clone(), known)).collect())
    })
}

/// What is linked in place at and below `within`, or in the whole root.
pub(super) fn linked<'a>(store: &'a Store, root: RootId, within: Option<&'a RelPath>) -> Pages<'a, FileRow> {
    Pages::new(move |after| {
        let within = within.map_or(&[][..], RelPath::as_bytes);
        let page = store.files_page(root, within, after.map(RelPath::as_bytes), PAGE_ROWS)?;
        page.into_iter().map(|(path, row)| Ok((path.try_into()?, row))).collect()
    })
}

const PAGE_ROWS: usize = 4096;
