use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use nfs::Mount;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::{
    net::{UnixListener, UnixStream},
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use tracing::{error, info, warn};

use crate::{
    control,
    failure::{Code, Failure, WhileDoing},
    home::{Home, SocketPath},
    node::{Node, NodeOptions},
};

/// A daemon that runs in this process.
pub(crate) struct Daemon {
    /// Its home.
    pub node: Node,
    mount: Option<Mount>,
    stop: watch::Sender<bool>,
    serving: tokio::task::JoinHandle<()>,
}

impl Daemon {
    /// Opens the home and listens on its socket. Fails if another daemon does.
    pub(crate) async fn start(home: &Home, options: &NodeOptions) -> Result<Self, Failure> {
        home.create()?;
        raise_open_files();
        let listener = listen(&home.socket).await?;
        let node = Node::open(home, options).inspect_err(|_| {
            let _ = fs::remove_file(&home.socket);
        })?;
        let (stop, mut stopped) = watch::channel(false);
        let mount = node.serve_mount(stop.subscribe()).await.inspect_err(|_| {
            let _ = fs::remove_file(&home.socket);
        })?;
        let router = control::router(node.clone());
        let serving = tokio::spawn(async move {
            let until = async move {
                let _ = stopped.wait_for(|&stop| stop).await;
            };
            if let Err(error) = axum::serve(listener, router).with_graceful_shutdown(until).await {
                error!(reason = tree::reason(&error), "the control socket failed");
            }
        });
        let (scrubbing, stopped) = (node.clone(), stop.subscribe());
        tokio::spawn(async move { scrubbing.scrub(scrubbing.scrub_settings(), stopped).await });
        tokio::spawn(node.clone().watch_for_stalls(stop.subscribe()));
        tokio::spawn(node.clone().watch_cache(stop.subscribe()));
        tokio::spawn(node.clone().keep_pins(stop.subscribe()));
        tokio::spawn(node.clone().keep_up(node.watch_settings(), stop.subscribe()));
        Ok(Self { node, mount, stop, serving })
    }

    /// Waits for SIGINT or SIGTERM; fails if the database does.
    pub(crate) async fn over(&self) -> Result<(), Failure> {
        tokio::select! {
            interrupted = interrupted() => interrupted,
            failure = self.node.database_failed() => {
                error!(reason = failure.reason(), "stopping: the database failed");
                Err(failure)
            }
        }
    }

    /// Ends everything, in order. Takes a few seconds at most.
    pub(crate) async fn stop(self) {
        let socket = self.node.home().socket.clone();
        self.stop.send_replace(true);
        self.serving.abort();
        let _ = self.serving.await;
        let _ = fs::remove_file(socket);
        if let Some(mount) = self.mount {
            mount.stop().await;
        }
        self.node.shutdown().await;
    }
}

/// Lets this process have more files open than a shell or an init system gives it to begin with: copies have many.
fn raise_open_files() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = maximum.map_or(OPEN_FILES_MAX, |maximum| maximum.min(OPEN_FILES_MAX));
    if current.is_some_and(|current| current < wanted) {
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum });
    }
    if let Some(files) = getrlimit(Resource::Nofile).current.filter(|files| *files < OPEN_FILES_FEW) {
        warn!(files, "few files may be open at once: raise LimitNOFILE in the unit, or the hard limit, ulimit -Hn");
    }
}

const OPEN_FILES_MAX: u64 = 4096;
/// Open files below which copies of many files and many mount readers fail.
const OPEN_FILES_FEW: u64 = 512;

/// Waits for SIGINT or SIGTERM.
async fn interrupted() -> Result<(), Failure> {
    let mut terminate = signal(SignalKind::terminate()).while_doing("listen for signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).while_doing("listen for signals")?;
    tokio::select! {
        _ = terminate.recv() => info!(signal = "SIGTERM", "stopping"),
        _ = interrupt.recv() => info!(signal = "SIGINT", "stopping"),
    }
    Ok(())
}

async fn listen(socket: &Path) -> Result<UnixListener, Failure> {
    let short = SocketPath::of(socket).while_doing(format!("listen on {socket:?}"))?;
    if UnixStream::connect(&short).await.is_ok() {
        return Err(Failure::new(Code::Error, format!("a daemon runs already at {socket:?}"))
            .hint("one daemon holds all arenas: add another with blob arena add NAME DIR"));
    }
    // Left over from a daemon that was killed.
    let _ = fs::remove_file(socket);
    let listen = || {
        let listener = UnixListener::bind(&short)?;
        fs::set_permissions(socket, fs::Permissions::from_mode(0o600))?;
        Ok::<_, std::io::Error>(listener)
    };
    listen().while_doing(format!("listen on {socket:?}"))
}
