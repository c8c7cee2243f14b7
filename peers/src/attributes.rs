//! Extended attributes and ACLs of files and directories, within bounds.

use serde::{Deserialize, Serialize};
use tree::BlobId;

/// The extended attributes of a file or directory, ACLs among them, ascending by name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attributes {
    /// Each one.
    pub list: Vec<Attribute>,
    /// Whether there are more: they could not be read, or were out of bounds.
    pub is_cut: bool,
}

/// An extended attribute.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attribute {
    /// Its name, namespace included: 1 to 255 bytes, none of them 0.
    pub name: Vec<u8>,
    /// Its value.
    pub value: Vec<u8>,
}

impl Attributes {
    /// Takes these, in any order; those that do not fit are left out, and it is [cut](Self::is_cut).
    pub fn new(mut list: Vec<Attribute>, is_cut: bool) -> Self {
        list.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        let mut all = Self { list: Vec::new(), is_cut };
        let mut bytes = 0;
        for attribute in list {
            bytes += attribute.bytes();
            if !attribute.is_valid() || all.list.len() == ATTRIBUTES_MAX || bytes > ATTRIBUTES_BYTES_MAX {
                all.is_cut = true;
                break;
            }
            all.list.push(attribute);
        }
        all
    }

    /// Whether there is nothing to be kept.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty() && !self.is_cut
    }

    /// What stands for them: the same for the same attributes only.
    pub fn digest(&self) -> BlobId {
        BlobId::of(&postcard::to_stdvec(self).unwrap_or_default())
    }

    /// Whether somebody may say so.
    pub(crate) fn is_valid(&self) -> bool {
        self.list.len() <= ATTRIBUTES_MAX
            && self.list.iter().map(Attribute::bytes).sum::<usize>() <= ATTRIBUTES_BYTES_MAX
            && self.list.iter().all(Attribute::is_valid)
            && self.list.is_sorted_by(|a, b| a.name < b.name)
    }
}

impl Attribute {
    fn bytes(&self) -> usize {
        self.name.len() + self.value.len()
    }

    fn is_valid(&self) -> bool {
        (1..=NAME_BYTES_MAX).contains(&self.name.len()) && !self.name.contains(&0)
    }
}

/// The most attributes of one file, and bytes of their names and values together.
const ATTRIBUTES_MAX: usize = 128;
const ATTRIBUTES_BYTES_MAX: usize = 32 << 10;
const NAME_BYTES_MAX: usize = 255;
/// What they may take on the wire: each length is at most three bytes.
pub(crate) const ATTRIBUTES_WIRE_BYTES_MAX: usize = ATTRIBUTES_BYTES_MAX + 6 * ATTRIBUTES_MAX + 8;

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(name: &str, bytes: usize) -> Attribute {
        Attribute { name: name.into(), value: vec![7; bytes] }
    }

    #[test]
    fn what_is_out_of_bounds_is_left_out_and_told() {
        let check = |list: Vec<Attribute>, kept: &[&str], is_cut| {
            let taken = Attributes::new(list.clone(), false);
            let names: Vec<_> = taken.list.iter().map(|kept| String::from_utf8_lossy(&kept.name)).collect();
            assert_eq!(
                (&names[..], taken.is_cut),
                (&kept.iter().map(|&name| name.into()).collect::<Vec<_>>()[..], is_cut)
            );
            assert!(taken.is_valid());
            assert!(postcard::to_stdvec(&taken).unwrap().len() <= ATTRIBUTES_WIRE_BYTES_MAX);
            assert!(!is_cut || !Attributes { list, is_cut }.is_valid());
        };
        check(vec![], &[], false);
        check(vec![attribute("user.b", 1), attribute("user.a", 0)], &["user.a", "user.b"], false);
        check(vec![attribute("a", 32767)], &["a"], false);
        check(vec![attribute("a", 32768)], &[], true);
        check(vec![attribute("a", 9), attribute("b", 32758), attribute("c", 1)], &["a"], true);
        check(vec![attribute("", 1)], &[], true);
        check(vec![attribute(&"n".repeat(256), 1)], &[], true);
        let many: Vec<_> = (100..229).map(|n| attribute(&n.to_string(), 200)).collect();
        assert_eq!(Attributes::new(many, false).list.len(), 128);
        assert!(!Attributes { list: vec![attribute("b", 1), attribute("a", 1)], is_cut: false }.is_valid());
        assert!(!Attributes { list: vec![attribute("a", 1), attribute("a", 1)], is_cut: false }.is_valid());
        assert!(Attributes::default().is_empty() && !Attributes::new(vec![], true).is_empty());
    }

    #[test]
    fn other_attributes_have_another_digest() {
        let (a, b) = (attribute("user.a", 1), attribute("user.b", 1));
        let all = [vec![], vec![a.clone()], vec![b.clone()], vec![a, b]];
        let digests =
            all.into_iter().flat_map(|list| [false, true].map(|cut| Attributes::new(list.clone(), cut).digest()));
        let digests: std::collections::BTreeSet<_> = digests.collect();
        assert_eq!(digests.len(), 8);
    }
}
