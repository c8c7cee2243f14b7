//! Everything that a person does with blobd.

fn main() -> std::process::ExitCode {
    cli::main_blob()
}
