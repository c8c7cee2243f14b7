use std::{
    fs, io,
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use namespace::PeerId;
use ring::{
    hmac,
    rand::SystemRandom,
    signature::{Ed25519KeyPair, KeyPair},
};
use rustls::{
    crypto::ring::sign::any_eddsa_type,
    pki_types::{CertificateDer, PrivatePkcs8KeyDer},
    sign::CertifiedKey,
};

/// A machine's Ed25519 key pair. Its public half is the machine's peer id.
#[derive(Clone)]
pub struct Identity {
    peer: PeerId,
    key: Arc<CertifiedKey>,
    secret: hmac::Key,
}

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The key's file failed.
    #[error("{action} the key {path:?}")]
    File {
        /// What was being done.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file holds no Ed25519 key in PKCS #8.
    #[error("{path:?} holds no Ed25519 key")]
    NoKey {
        /// The file.
        path: PathBuf,
    },
    /// The system gives no randomness.
    #[error("no randomness to be had for a key")]
    NoRandomness,
}

impl Identity {
    /// Reads the key in the file `path`; makes one, readable by its owner only, if the file is not there.
    pub fn load_or_create(path: &Path) -> Result<Self, IdentityError> {
        let failed = |action| {
            let path = path.to_owned();
            move |source| IdentityError::File { action, path, source }
        };
        match fs::read(path) {
            Ok(pkcs8) => Self::from_pkcs8(&pkcs8).ok_or(IdentityError::NoKey { path: path.to_owned() }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let pkcs8 = Self::new_pkcs8()?;
                let staged = path.with_extension("new");
                let write = || {
                    let mut file =
                        fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&staged)?;
                    file.write_all(&pkcs8)?;
                    file.sync_all()?;
                    fs::rename(&staged, path)?;
                    path.parent().map_or(Ok(()), |dir| fs::File::open(dir)?.sync_all())
                };
                write().map_err(failed("write"))?;
                Self::from_pkcs8(&pkcs8).ok_or(IdentityError::NoRandomness)
            }
            Err(error) => Err(failed("read")(error)),
        }
    }

    /// A new key, for a machine that lives as long as this value.
    pub fn ephemeral() -> Result<Self, IdentityError> {
        Self::from_pkcs8(&Self::new_pkcs8()?).ok_or(IdentityError::NoRandomness)
    }

    fn new_pkcs8() -> Result<Vec<u8>, IdentityError> {
        let pkcs8 = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).map_err(|_| IdentityError::NoRandomness)?;
        Ok(pkcs8.as_ref().to_owned())
    }

    fn from_pkcs8(pkcs8: &[u8]) -> Option<Self> {
        let pair = Ed25519KeyPair::from_pkcs8(pkcs8).ok()?;
        let peer = PeerId::from_bytes(pair.public_key().as_ref().try_into().ok()?);
        let signer = any_eddsa_type(&PrivatePkcs8KeyDer::from(pkcs8.to_owned())).ok()?;
        let public = CertificateDer::from(signer.public_key()?.to_vec());
        let secret = hmac::Key::new(hmac::HMAC_SHA256, pkcs8);
        Some(Self { peer, key: Arc::new(CertifiedKey::new(vec![public], signer)), secret })
    }

    /// The public key.
    pub fn peer(&self) -> PeerId {
        self.peer
    }

    /// A secret for one purpose, which is the same whenever the machine starts: HMAC-SHA-256 of `context`, which names the
    /// purpose, under the secret key.
    pub fn derive(&self, context: &[u8]) -> [u8; 32] {
        let mut secret = [0; 32];
        secret.copy_from_slice(hmac::sign(&self.secret, context).as_ref());
        secret
    }

    /// With it, this machine tells others that their connections are gone.
    pub(crate) fn reset_key(&self) -> [u8; 32] {
        self.derive(RESET_CONTEXT)
    }

    /// The pair as rustls takes it; the "certificate" is the bare public key (RFC 7250).
    pub(crate) fn certified_key(&self) -> Arc<CertifiedKey> {
        self.key.clone()
    }
}

const RESET_CONTEXT: &[u8] = b"blobd 1 stateless reset";

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_key_is_made_once_and_kept_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let first = Identity::load_or_create(&path).unwrap();
        let second = Identity::load_or_create(&path).unwrap();
        assert_eq!((second.peer(), second.reset_key()), (first.peer(), first.reset_key()));
        assert_ne!(Identity::ephemeral().unwrap().reset_key(), first.reset_key());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        fs::write(&path, b"nonsense").unwrap();
        assert!(matches!(Identity::load_or_create(&path), Err(IdentityError::NoKey { .. })));
    }
}
