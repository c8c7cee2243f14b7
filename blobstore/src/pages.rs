//! Which files are linked below a root, a page at a time: there may be millions.

use std::{ops::Bound, vec};

use crate::{
    FileRow, RootId, Store, StoreError,
    rows::{FILES, decode_or_none},
};

/// The files linked below a directory, ascending by path: [`Store::files`].
///
/// Holds a page of them in memory. Between two pages others may write: what is linked or unlinked meanwhile, and lies
/// ahead, is seen or not seen.
pub struct Files<'a> {
    store: &'a Store,
    root: RootId,
    dir: Vec<u8>,
    page: vec::IntoIter<(Vec<u8>, FileRow)>,
    last: Option<Vec<u8>>,
    ended: bool,
}

impl Store {
    /// All files linked below `root`, ascending by the bytes of their paths. Rows that do not decode are left out.
    pub fn files(&self, root: RootId) -> Files<'_> {
        self.files_within(root, b"")
    }

    /// Those of them whose path is `dir`, or leads through it; all, if `dir` is empty.
    pub fn files_within(&self, root: RootId, dir: &[u8]) -> Files<'_> {
        let page = Vec::new().into_iter();
        Files { store: self, root, dir: dir.to_owned(), page, last: None, ended: false }
    }

    /// The first `max` of the files that [`files_within`](Self::files_within) gives whose path is greater than
    /// `after`. If there are fewer, there are no more.
    pub fn files_page(
        &self,
        root: RootId,
        dir: &[u8],
        after: Option<&[u8]>,
        max: usize,
    ) -> Result<Vec<(Vec<u8>, FileRow)>, StoreError> {
        self.page(root, dir, after, max, decode_or_none)
    }

    /// The same of what `read` makes of each row; where that is nothing, the row is left out.
    pub(crate) fn page<T>(
        &self,
        root: RootId,
        dir: &[u8],
        after: Option<&[u8]>,
        max: usize,
        read: impl Fn(&[u8]) -> Option<T>,
    ) -> Result<Vec<(Vec<u8>, T)>, StoreError> {
        self.read_rows("list files", |txn| {
            let table = txn.open_table(FILES)?;
            let mut page = Vec::new();
            for (mut from, to) in spans(dir) {
                // The least path that is greater.
                from = after.map(|after| [after, b"\0"].concat()).unwrap_or_default().max(from);
                let to = match &to {
                    Some(to) if from >= *to => continue,
                    Some(to) => Bound::Excluded((root.0, &to[..])),
                    None => root.0.checked_add(1).map_or(Bound::Unbounded, |next| Bound::Excluded((next, &[][..]))),
                };
                for row in table.range::<(u32, &[u8])>((Bound::Included((root.0, &from[..])), to))? {
                    if page.len() >= max {
                        break;
                    }
                    let (key, row) = row?;
                    page.extend(read(row.value()).map(|row| (key.value().1.to_owned(), row)));
                }
            }
            Ok(page)
        })
    }
}

impl Iterator for Files<'_> {
    type Item = Result<(Vec<u8>, FileRow), StoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.page.len() == 0 && !self.ended {
            match self.store.files_page(self.root, &self.dir, self.last.as_deref(), PAGE_ROWS) {
                Ok(page) => {
                    self.ended = page.len() < PAGE_ROWS;
                    self.last = page.last().map(|(path, _)| path.clone());
                    self.page = page.into_iter();
                }
                Err(error) => {
                    self.ended = true;
                    return Some(Err(error));
                }
            }
        }
        self.page.next().map(Ok)
    }
}

/// Where the paths are that are `dir` or lead through it, as ranges from a path up to but without another; without a
/// second one, up to the end. Others, as `dir-1` and `dir.txt`, stand between them.
fn spans(dir: &[u8]) -> Vec<(Vec<u8>, Option<Vec<u8>>)> {
    if dir.is_empty() {
        return vec![(Vec::new(), None)];
    }
    // `0` comes just behind `/`.
    let with = |end: &[u8]| [dir, end].concat();
    vec![(dir.to_owned(), Some(with(b"\0"))), (with(b"/"), Some(with(b"0")))]
}

/// So many rows are in memory at once: some hundreds of kilobytes.
pub(crate) const PAGE_ROWS: usize = 4096;
