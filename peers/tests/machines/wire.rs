//! The wire between two machines, where its bytes can be counted.

use std::{
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

/// Passes on what one dialler and one listener send each other, until the process ends.
pub(crate) struct Wire {
    pub(crate) address: SocketAddr,
    bytes: Arc<AtomicU64>,
}

impl Wire {
    /// To the listener at `to`.
    pub(crate) fn to(to: SocketAddr) -> Self {
        let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
        let (near, far) = (UdpSocket::bind(loopback).unwrap(), UdpSocket::bind(loopback).unwrap());
        far.connect(to).unwrap();
        let (address, bytes) = (near.local_addr().unwrap(), Arc::new(AtomicU64::new(0)));
        let (back_near, back_far) = (near.try_clone().unwrap(), far.try_clone().unwrap());
        let (there, back) = (bytes.clone(), bytes.clone());
        thread::spawn(move || {
            let mut buffer = [0; 1 << 16];
            // Whoever sends first is who is answered.
            let (first, from) = near.recv_from(&mut buffer).unwrap();
            near.connect(from).unwrap();
            far.send(&buffer[..first]).unwrap();
            thread::spawn(move || pass_on(&back_far, &back_near, &back));
            pass_on(&near, &far, &there);
        });
        Self { address, bytes }
    }

    /// How many bytes of UDP payload went over it, both ways.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

fn pass_on(from: &UdpSocket, to: &UdpSocket, bytes: &AtomicU64) {
    let mut buffer = [0; 1 << 16];
    while let Ok(count) = from.recv(&mut buffer) {
        bytes.fetch_add(count as u64, Ordering::Relaxed);
        if to.send(&buffer[..count]).is_err() {
            return;
        }
    }
}
