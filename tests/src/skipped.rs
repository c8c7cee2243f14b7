use std::{env, fs::File, io::Write, thread};

/// Says that this test is left out here, and why: on standard error, and in the file `skipped-tests` beside what cargo
/// builds, which `.ci/run` shows at its end.
pub fn skipped(why: &str) {
    let name = thread::current().name().unwrap_or("a test").to_owned();
    eprintln!("skipped: {name}: {why}");
    let program = env::current_exe().expect("this test is a file");
    // Tests are in target/PROFILE/deps, benchmarks in target/PROFILE.
    let above = if program.parent().is_some_and(|dir| dir.ends_with("deps")) { 3 } else { 2 };
    let Some(target) = program.ancestors().nth(above) else { return };
    let file = File::options().create(true).append(true).open(target.join("skipped-tests"));
    if let Err(error) = file.and_then(|mut file| writeln!(file, "{name}: {why}")) {
        eprintln!("cannot note that in {}: {error}", target.display());
    }
}
