//! A parent runs a function in a child process, and waits for it to end.
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

/// What Python brings along.
mod multiprocessing {
    use std::error::Error;
    use std::io::{self, Write};
    use std::panic::{self, AssertUnwindSafe};

    use nix::errno::Errno;
    use nix::libc::_exit;
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, Pid, fork};

    /// Waits for its child when it is dropped without a `join`, as Python does when it exits.
    pub struct Process<A> {
        target: fn(A),
        args: Option<A>,  // until its start
        pid: Option<Pid>, // from then on until it is reaped
    }

    impl<A> Process<A> {
        pub fn new(target: fn(A), args: A) -> Self {
            Process {
                target,
                args: Some(args),
                pid: None,
            }
        }

        /// The caller must see to it that this process has a single thread: a lock that another one
        /// holds would never be released in the child. A target that draws from `rand` must call
        /// `rand::rng().reseed()` first, or it may draw the same numbers as its parent.
        pub fn start(&mut self) -> Result<(), Box<dyn Error>> {
            assert!(self.args.is_some(), "cannot start a process twice");
            io::stdout().flush()?; // the child would print what is left, too
            // SAFETY: the caller sees to it that this process has a single thread, so its child may
            // do whatever it may do itself.
            match unsafe { fork() }.map_err(|error| format!("fork: {error}"))? {
                ForkResult::Child => {
                    let run = || self.args.take().map(self.target);
                    let ended = panic::catch_unwind(AssertUnwindSafe(run));
                    let flushed = io::stdout().flush(); // if it fails, status 1 tells
                    // SAFETY: `_exit` has no precondition. It runs nothing that is the parent's.
                    unsafe { _exit(i32::from(ended.is_err() || flushed.is_err())) }
                }
                ForkResult::Parent { child } => (self.pid, self.args) = (Some(child), None),
            }
            Ok(())
        }

        /// Fails if the child panicked, was killed or exited with a status other than 0.
        pub fn join(&mut self) -> Result<(), Box<dyn Error>> {
            assert!(self.args.is_none(), "can only join a started process");
            while let Some(pid) = self.pid {
                let end = match waitpid(pid, None) {
                    Ok(WaitStatus::Exited(_, 0)) => Ok(()),
                    Ok(WaitStatus::Exited(_, code)) => Err(format!("exited with status {code}")),
                    Ok(WaitStatus::Signaled(_, by, _)) => Err(format!("was killed by {by}")),
                    Ok(_) | Err(Errno::EINTR) => continue, // it has not ended yet
                    Err(error) => Err(format!("cannot be waited for: {error}")),
                };
                self.pid = None;
                end.map_err(|end| format!("process {pid} {end}"))?;
            }
            Ok(())
        }
    }

    impl<A> Drop for Process<A> {
        fn drop(&mut self) {
            if let Some(Err(error)) = self.pid.map(|_| self.join()) {
                let _ = writeln!(io::stderr(), "Error: {error}"); // there is nobody else to tell
            }
        }
    }
}
