use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bounds what is in flight, in bytes: many small files at a time, or one large one. First come, first served.
#[derive(Debug, Clone)]
pub struct Gate {
    units: Arc<Semaphore>,
    units_max: u32,
}

/// A place behind the [`Gate`]; dropped when what it is for has arrived.
#[derive(Debug)]
pub struct Pass {
    _permit: OwnedSemaphorePermit,
}

impl Gate {
    /// At most `bytes_max` bytes are in flight, and 4 KiB at the least.
    pub fn new(bytes_max: u64) -> Self {
        let units_max = u32::try_from(bytes_max / UNIT_BYTES).unwrap_or(u32::MAX).clamp(1, UNITS_MOST);
        Self { units: Arc::new(Semaphore::new(units_max as usize)), units_max }
    }

    /// How many bytes may be in flight: 4 KiB or more.
    pub fn bytes_max(&self) -> u64 {
        u64::from(self.units_max) * UNIT_BYTES
    }

    /// Waits until `bytes` more may be in flight. What is larger than the whole waits to be alone. Every file counts at
    /// least 4 KiB.
    pub async fn pass(&self, bytes: u64) -> Pass {
        let units = u32::try_from(bytes.div_ceil(UNIT_BYTES)).unwrap_or(u32::MAX).clamp(1, self.units_max);
        let permit = self.units.clone().acquire_many_owned(units).await;
        Pass { _permit: permit.unwrap_or_else(|_| unreachable!("the semaphore is never closed")) }
    }
}

const UNIT_BYTES: u64 = 4096;
/// 1 TiB: more than a semaphore's permits are not needed.
const UNITS_MOST: u32 = 1 << 28;

#[cfg(test)]
mod tests {
    use std::{
        future::Future,
        pin::{Pin, pin},
        task::{Context, Poll, Waker},
    };

    use super::*;

    fn poll<F: Future>(future: &mut Pin<&mut F>) -> Option<F::Output> {
        match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(output) => Some(output),
            Poll::Pending => None,
        }
    }

    #[test]
    fn many_small_ones_or_a_large_one_in_the_order_they_came() {
        let gate = Gate::new(64 << 10);
        let small: Vec<_> = (0..8).map(|_| poll(&mut pin!(gate.pass(1))).unwrap()).collect();
        let (mut large, mut behind) = (pin!(gate.pass(u64::MAX)), pin!(gate.pass(0)));
        assert!(poll(&mut large).is_none(), "32 KiB are in flight, and it waits to be alone");
        assert!(poll(&mut behind).is_none(), "there is room for it, but the large one came first");
        drop(small);
        let alone = poll(&mut large).unwrap();
        assert!(poll(&mut behind).is_none());
        drop(alone);
        assert!(poll(&mut behind).is_some());
    }
}
