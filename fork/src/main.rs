//! A process makes a second one with fork(2), and both go on from there.
//!
//! The tutorial's section 一、fork 系统调用 (the fork system call), `demo1/fork.py`.
//! Run it with `cargo run -p fork`.

use std::error::Error;
use std::io::{self, Write};

use nix::errno::Errno;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork, getpid, getppid};

fn main() -> Result<(), Box<dyn Error>> {
    println!("Process ({}) start...", getpid());
    io::stdout().flush()?; // the child would print what is left, too
    // Only works on Unix/Linux/Mac:
    // SAFETY: this process has a single thread, so its child may do whatever it may do itself.
    match unsafe { fork() }? {
        ForkResult::Child => println!(
            "I am child process ({}) and my parent is {}.",
            getpid(),
            getppid()
        ),
        ForkResult::Parent { child } => {
            println!("I ({}) just created a child process ({child}).", getpid());
            // Python's parent exits slowly; this one might be gone before the child asks for its id.
            loop {
                match waitpid(child, None) {
                    Ok(WaitStatus::Exited(_, 0)) => break,
                    Err(Errno::EINTR) => {} // a signal came, so wait again
                    end => return Err(format!("child process: {:?}", end?).into()),
                }
            }
        }
    }
    Ok(())
}
