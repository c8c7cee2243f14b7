//! The daemon.

fn main() -> std::process::ExitCode {
    cli::main_blobd()
}
