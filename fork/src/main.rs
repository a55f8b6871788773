//! A process makes a second one with fork(2), and both go on from there.
//!
//! The tutorial's section 一、fork 系统调用 (the fork system call), `demo1/fork.py`.
//! Run it with `cargo run -p fork`.

use std::fmt;
use std::io::{self, Write};

use nix::errno::Errno;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, getpid, getppid};

fn main() -> Result<(), Error> {
    println!("Process ({}) start...", getpid());
    io::stdout().flush().map_err(failed("flush"))?; // the child would print what is left, too
    // Only works on Unix/Linux/Mac:
    // SAFETY: this process has a single thread, so its child may do whatever it may do itself.
    match unsafe { fork() }.map_err(failed("fork"))? {
        ForkResult::Child => {
            println!(
                "I am child process ({}) and my parent is {}.",
                getpid(),
                getppid()
            );
        }
        ForkResult::Parent { child } => {
            println!("I ({}) just created a child process ({child}).", getpid());
            // Python's parent exits slowly; this one might be gone before the child asks for it.
            wait(child)?;
        }
    }
    Ok(())
}

// What Python brings along:

/// Stands in for `os.waitpid(pid, 0)`: waits until the child `pid` has ended, and reaps it.
///
/// Fails, and says how it ended, unless it exited with status 0.
fn wait(pid: Pid) -> Result<(), Error> {
    loop {
        let end = match waitpid(pid, None) {
            Ok(WaitStatus::Exited(_, 0)) => return Ok(()),
            Ok(WaitStatus::Exited(_, status)) => format!("exited with status {status}"),
            Ok(WaitStatus::Signaled(_, by, _)) => format!("was killed by {by}"),
            Ok(_) | Err(Errno::EINTR) => continue, // it has not ended yet
            Err(cause) => format!("cannot be waited for: {cause}"),
        };
        return Err(Error(format!("process {pid} {end}")));
    }
}

/// Stands in for an exception that ends the program: what went wrong, in one line.
struct Error(String);

/// `main` shows the error that it returns by `Debug`, so that is the line as it stands.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Makes an [`Error`] of a cause by saying what failed.
fn failed<E: fmt::Display>(what: &str) -> impl FnOnce(E) -> Error {
    move |cause| Error(format!("{what}: {cause}"))
}
