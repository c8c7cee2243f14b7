//! The mount, as clients see it that speak NFS themselves.

mod abuse;
mod kernel;
mod libnfs;
mod reading;
mod tree;

use std::path::Path;

use tests::{Link, Machine, Quality, Scratch};

/// A machine that has files, one that reads them through a link, and the link.
struct Two {
    far: Machine,
    near: Machine,
    link: Link,
}

impl Two {
    /// `far` holds `docs`, and is reached through a link.
    fn start(scratch: &Scratch, docs: &Path, config: &str) -> Self {
        let far = Machine::up(scratch, "far", &[docs]);
        let near = Machine::up_with_config::<&Path>(scratch, "near", &[], config);
        let link = Link::start(far.address().parse().unwrap(), Quality::default()).unwrap();
        far.ok(["peer", "add", "near", &near.id()]);
        near.ok(["peer", "add", "far", &far.id(), "--address", &link.address().to_string()]);
        near.hears(&far);
        Self { far, near, link }
    }

    /// How many bytes came over the link.
    fn came(&self) -> u64 {
        self.link.carried()[1]
    }
}
