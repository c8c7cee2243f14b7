//! The digest that Linux's fs-verity measures of a file: SHA-256, blocks of 4 KiB, no salt; what `fsverity digest`
//! prints by default.
//!
//! A Merkle tree over zero-padded blocks: each level is the hashes of the blocks below, itself cut into blocks, until
//! one hash is left. The digest is the hash of a descriptor that holds that root and the file's size. Format: the
//! kernel's Documentation/filesystems/fsverity.rst.

use std::io;

use rayon::prelude::*;
use ring::digest::{Context, SHA256};
use tree::ReadAt;

type Hash = [u8; 32];

/// The fs-verity digest of `data`, whose size is `size` bytes. Takes memory for one read, whatever the size.
pub(crate) fn digest(data: &impl ReadAt, size: u64) -> io::Result<Hash> {
    let mut tree = Tree::default();
    let mut buffer = vec![0; size.min(READ_BYTES) as usize];
    let mut offset = 0;
    while offset < size {
        let read = &mut buffer[..(size - offset).min(READ_BYTES) as usize];
        data.read_exact_at(read, offset)?;
        let hashes: Vec<Hash> = read.par_chunks(BLOCK_BYTES).map(hash_block).collect();
        hashes.into_iter().for_each(|hash| tree.push(0, hash));
        offset += read.len() as u64;
    }
    let mut descriptor = [0; 256];
    descriptor[..3].copy_from_slice(&[VERSION, HASH_IS_SHA256, BLOCK_BYTES.ilog2() as u8]);
    descriptor[8..16].copy_from_slice(&size.to_le_bytes());
    descriptor[16..48].copy_from_slice(&tree.root());
    Ok(sha256(&[&descriptor]))
}

/// The block that is being filled at each level, the hashes of data blocks first. A full one is hashed at once.
#[derive(Default)]
struct Tree(Vec<Vec<u8>>);

impl Tree {
    fn push(&mut self, level: usize, hash: Hash) {
        if self.0.len() == level {
            self.0.push(Vec::with_capacity(BLOCK_BYTES));
        }
        let block = &mut self.0[level];
        block.extend_from_slice(&hash);
        if block.len() == BLOCK_BYTES {
            self.close(level);
        }
    }

    fn close(&mut self, level: usize) {
        let hash = hash_block(&self.0[level]);
        self.0[level].clear();
        self.push(level + 1, hash);
    }

    /// The hash that is left once all blocks are closed; that of no data at all is zeros.
    fn root(mut self) -> Hash {
        let mut level = 0;
        while level < self.0.len() {
            let block = &self.0[level];
            if level + 1 == self.0.len()
                && let Ok(root) = block[..].try_into()
            {
                return root;
            }
            if !block.is_empty() {
                self.close(level);
            }
            level += 1;
        }
        Hash::default()
    }
}

fn hash_block(block: &[u8]) -> Hash {
    sha256(&[block, &[0; BLOCK_BYTES][block.len()..]])
}

fn sha256(parts: &[&[u8]]) -> Hash {
    let mut context = Context::new(&SHA256);
    parts.iter().for_each(|part| context.update(part));
    context.finish().as_ref().try_into().expect("SHA-256 has 32 bytes")
}

const BLOCK_BYTES: usize = 4096;
const READ_BYTES: u64 = 1 << 20;
const VERSION: u8 = 1;
const HASH_IS_SHA256: u8 = 1;

#[cfg(test)]
mod tests {
    use data_encoding::HEXLOWER;

    use super::*;

    /// Made with Debian's fsverity 1.5. The last size fills two levels and begins a new block at each.
    #[test]
    fn golden_vectors() {
        for (size, expected) in [
            (0, "3d248ca542a24fc62d1c43b916eae5016878e2533c88238480b26128a1f1af95"),
            (4097, "d9506b21de2c8f9f6c53729c5f642eba79d11ec2d2f72767b3d315fe26038bfc"),
            (128 * 128 * 4096 + 1, "8699c43c1ded2bd0fa6eb85d1583f87790d165a201c647ef3bdd01b2f21476f0"),
        ] {
            let data = vec![7; size];
            let digest = digest(&&data[..], size as u64).unwrap();
            assert_eq!(HEXLOWER.encode(&digest), expected, "{size} bytes");
        }
    }

    #[test]
    fn data_that_ends_early() {
        let error = digest(&&[7; 5000][..], 5001).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
