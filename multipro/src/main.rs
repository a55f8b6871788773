//! A parent runs a function in a child process, and waits for the child to end.
//!
//! The tutorial's section 二、multiprocessing, `demo2/multipro.py`.
//! Run it with `cargo run -p multipro`.

use std::error::Error;

use multiprocessing::Process;
use nix::unistd::getpid;

// The code that the child process runs
fn run_proc(name: &str) {
    println!("Run child process {name} ({})...", getpid());
}

fn main() -> Result<(), Box<dyn Error>> {
    println!("Parent process {}.", getpid());
    let mut p = Process::new(run_proc, "test");
    println!("Child process will start.");
    p.start()?;
    p.join()?;
    println!("Child process end.");
    Ok(())
}

/// The part of Python's `multiprocessing` that this program needs; `pub` for its tests.
pub mod multiprocessing {
    use std::error::Error;
    use std::io::{self, Write};
    use std::panic::{self, AssertUnwindSafe};
    use std::process::{ExitCode, Termination};

    use nix::errno::Errno;
    use nix::libc::_exit;
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, Pid, fork};

    /// A child process that runs a function.
    ///
    /// A process that is dropped without `join` is not waited for, as with std's `Child`.
    #[derive(Debug)]
    pub struct Process<A, R> {
        target: fn(A) -> R,
        args: Option<A>, // `None` once started: the child has it, the parent's copy is dropped
        pid: Option<Pid>, // `Some` from `start` to `join`
    }

    impl<A, R: Termination> Process<A, R> {
        /// Makes a process that will call `target(args)` once it is started.
        pub fn new(target: fn(A) -> R, args: A) -> Self {
            Process {
                target,
                args: Some(args),
                pid: None,
            }
        }

        /// Starts the child, which calls the target and ends. Fails if stdout cannot be flushed or
        /// no child can be made. Panics (Python: AssertionError) if the process was started before.
        ///
        /// Call this only while the process has one thread: fork copies no other. (`start` ought to
        /// be an `unsafe fn`; it is not, to read like Python's.) A lock that the caller holds stays
        /// locked in the child. Make an async runtime only in the child.
        /// A target that draws numbers from the crate rand must first call `rand::rng().reseed()`;
        /// otherwise all children may draw the same ones.
        ///
        /// If the target returns an error or panics, the child prints that to stderr and exits with
        /// status 1 (with `panic = "abort"`, a panic kills it). It also exits with 1 if the target
        /// returns an `ExitCode` other than `SUCCESS`, or if stdout cannot be flushed. The parent
        /// drops its copy of `args`: that must not remove what the child needs, such as a file.
        pub fn start(&mut self) -> Result<(), Box<dyn Error>> {
            assert!(self.args.is_some(), "cannot start a process twice");
            // Without this, both processes would print what is still buffered.
            io::stdout().flush().map_err(|e| format!("stdout: {e}"))?;
            // SAFETY: the caller has one thread, so the child may call any function.
            match unsafe { fork() }.map_err(|e| format!("fork: {e}"))? {
                ForkResult::Child => {
                    // `report` prints an error, as it does for `main`.
                    let run = || self.args.take().map(self.target).map(R::report);
                    // `ended` is not dropped: a panic's payload may panic again in its drop.
                    let ended = panic::catch_unwind(AssertUnwindSafe(run));
                    let ok = matches!(ended, Ok(Some(ExitCode::SUCCESS)));
                    let flushed = io::stdout().flush().is_ok(); // since `_exit` does not flush
                    // SAFETY: `_exit` can always be called; it skips the exit handlers.
                    unsafe { _exit(if ok && flushed { 0 } else { 1 }) }
                }
                ForkResult::Parent { child } => self.pid = Some(child),
            }
            self.args = None;
            Ok(())
        }

        /// Waits for the child to end; a second call returns `Ok`. Fails unless the child's exit
        /// status is 0. Panics if the process was never started.
        pub fn join(&mut self) -> Result<(), Box<dyn Error>> {
            assert!(self.args.is_none(), "can only join a started process");
            let Some(pid) = self.pid.take() else {
                return Ok(());
            };
            loop {
                let failure = match waitpid(pid, None) {
                    Ok(WaitStatus::Exited(_, 0)) => return Ok(()),
                    Ok(WaitStatus::Exited(_, status)) => format!("exited with status {status}"),
                    Ok(WaitStatus::Signaled(_, signal, _)) => format!("was killed by {signal}"),
                    Ok(_) | Err(Errno::EINTR) => continue, // the child has not ended yet
                    Err(e) => format!("has an unknown exit status: {e}"),
                };
                return Err(format!("process {pid} {failure}").into());
            }
        }
    }
}
