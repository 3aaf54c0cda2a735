//! The threads that carry connections. Each has a runtime of its own, and a connection
//! stays on one of them from accept to close: what wakes it wakes no other thread.

use std::{
    cell::Cell,
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::runtime::{Builder, Handle};

thread_local! {
    static CURRENT: Cell<usize> = const { Cell::new(usize::MAX) };
}

/// The number of the worker that runs this; of all other threads, the same one.
pub fn current() -> usize {
    CURRENT.get()
}

pub struct Workers {
    all: Vec<Worker>,
    next: AtomicUsize,
}

struct Worker {
    handle: Handle,
    /// Connections that it carries.
    load: Arc<AtomicUsize>,
}

/// A connection's share of its worker.
pub struct Load(Arc<AtomicUsize>);

impl Drop for Load {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Workers {
    /// As many as there are processors. They last as long as the process.
    pub fn start() -> io::Result<Self> {
        let count = std::thread::available_parallelism()?.get();
        let all: io::Result<Vec<Worker>> = (0..count).map(Worker::start).collect();
        Ok(Self {
            all: all?,
            next: AtomicUsize::new(0),
        })
    }

    /// Where the next listener is served.
    pub fn next(&self) -> &Handle {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        &self.all[turn % self.all.len()].handle
    }

    /// Where a connection is carried that this thread has accepted: here, unless here is
    /// more to do than elsewhere. `None`: here.
    pub fn choose(&self) -> (Option<&Handle>, Load) {
        /// More than that, and moving it is worth its price.
        const UNEVEN: usize = 2;
        let load = |worker: &Worker| worker.load.load(Ordering::Relaxed);
        let least = (self.all.iter().min_by_key(|w| load(w))).expect("there is one");
        let chosen = match self.all.get(current()) {
            Some(here) if load(here) < load(least) + UNEVEN => (None, here),
            _ => (Some(&least.handle), least),
        };
        chosen.1.load.fetch_add(1, Ordering::Relaxed);
        (chosen.0, Load(chosen.1.load.clone()))
    }
}

impl Worker {
    fn start(number: usize) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        std::thread::Builder::new()
            .name(format!("carrier-{number}"))
            .spawn(move || {
                CURRENT.set(number);
                runtime.block_on(std::future::pending::<()>());
            })?;
        Ok(Self {
            handle,
            load: Arc::default(),
        })
    }
}
